//! Where figures go: to stdout in a format, and to a file as a picture.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::{results::Point, summary};
use crate::error::{Error, Result};

/// How figures look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
    Md,
    Csv,
}

/// Where they go.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Output")]
pub(super) struct Output {
    /// table is for people; json is an object a line for each workload, md and csv a row
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub(super) format: Format,
    /// Draws a picture (SVG): of throughput and latency what the stages do, of the others throughput against latency
    #[arg(long, value_name = "FILE")]
    pub(super) plot: Option<PathBuf>,
}

impl Output {
    /// Whether the file could be written, before anything is measured in vain.
    pub(super) fn check(&self) -> Result<()> {
        let Some(path) = &self.plot else { return Ok(()) };
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if path.is_dir() {
            return Err(Error::io(path, "it is a folder"));
        }
        match folder.is_dir() {
            true => Ok(()),
            false => Err(Error::io(path, "there is no such folder to write it to")),
        }
    }

    /// Whether there may be a progress bar.
    pub(super) fn shows(&self) -> bool {
        self.format == Format::Table
    }

    /// Writes all points, or `table` instead where that is the format, and the picture.
    pub(super) fn write(
        &self,
        points: &[Point],
        table: Option<String>,
        picture: Option<String>,
    ) -> Result<u8> {
        let text = match (self.format, table) {
            (Format::Table, Some(table)) => table,
            (format, _) => summary::text(points, format),
        };
        let code = crate::cli::print(text.as_bytes())?;
        if let (Some(path), Some(picture)) = (&self.plot, picture) {
            std::fs::write(path, picture).map_err(|e| Error::io(path, e))?;
        }
        Ok(code)
    }
}
