//! `pipeline-infer devices`: what this machine can run stages on, and how fast it is.

use clap::{ArgMatches, Args, FromArgMatches, ValueEnum};
use serde::Serialize;

use super::{Subcommand, interrupt::Interrupt, print, table::columns};
use crate::{
    backend::{
        cpu::{self, CpuFacts},
        cuda::{self, Gpu, Link},
    },
    error::{Error, Result},
};

pub(super) const SUBCOMMAND: Subcommand = Subcommand {
    name: "devices",
    about: "Lists this machine's devices, measures them and the links between them",
    flags: DevicesArgs::augment_args,
    run,
};

#[derive(Debug, Clone, Args)]
struct DevicesArgs {
    /// Lists without measuring
    #[arg(long)]
    no_measure: bool,
    /// table is for people; json is one object
    #[arg(long, value_name = "FORMAT", default_value = "table", help_heading = "Output")]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// What there is, in the order of the JSON object.
#[derive(Debug, Serialize)]
struct Machine {
    cpu: CpuFacts,
    gpus: Vec<Gpu>,
    links: Vec<Link>,
    /// Why there is no GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    no_gpu: Option<String>,
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = DevicesArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    // Nobody listens for signals: one ends the process.
    Interrupt::install()?;
    let machine = Machine::look(!args.no_measure);
    let text = match args.format {
        Format::Table => machine.table(),
        Format::Json => {
            serde_json::to_string(&machine).expect("plain data becomes JSON; this is a bug") + "\n"
        }
    };
    print(text.as_bytes())
}

impl Machine {
    fn look(measure: bool) -> Machine {
        let (gpus, links, no_gpu) = match cuda::probe(measure) {
            Ok(probe) => (probe.gpus, probe.links, None),
            Err(Error::Device { device, why }) if device == "cuda" => (Vec::new(), Vec::new(), Some(why)),
            Err(error) => (Vec::new(), Vec::new(), Some(error.to_string())),
        };
        Machine { cpu: cpu::facts(), gpus, links, no_gpu }
    }

    fn table(&self) -> String {
        let CpuFacts { name, cores, instructions } = &self.cpu;
        let cores = if *cores == 1 { "1 core".into() } else { format!("{cores} cores") };
        let mut text = format!("cpu  {name}, {cores}, {instructions}\n");
        if let Some(why) = &self.no_gpu {
            text += &format!("no GPU: {why}\n");
        }
        if !self.gpus.is_empty() {
            text += &format!("\n{}", columns(&self.gpu_rows()));
        }
        if !self.links.is_empty() {
            text += &format!("\n{}", columns(&self.link_rows()));
        }
        text
    }

    fn gpu_rows(&self) -> Vec<Vec<String>> {
        let head = [
            "gpu",
            "name",
            "memory GB",
            "free",
            "arch",
            "multiprocessors",
            "L2 MB",
            "copy GB/s",
            "bf16 TFLOP/s",
        ];
        let gigabytes = |bytes: usize| format!("{:.1}", bytes as f64 / 1e9);
        let row = |gpu: &Gpu| {
            vec![
                format!("cuda:{}", gpu.facts.ordinal),
                gpu.facts.name.clone(),
                gigabytes(gpu.facts.memory_bytes),
                gpu.memory_free_bytes.map_or("-".into(), gigabytes),
                gpu.arch.clone(),
                gpu.facts.multiprocessors.to_string(),
                format!("{:.1}", gpu.facts.l2_bytes as f64 / 1e6),
                measured(gpu.copy_gb_per_s),
                measured(gpu.matmul_bf16_tflop_per_s),
            ]
        };
        std::iter::once(head.map(String::from).to_vec()).chain(self.gpus.iter().map(row)).collect()
    }

    /// From each GPU, a row, to each, a column.
    fn link_rows(&self) -> Vec<Vec<String>> {
        let name = |gpu: &Gpu| format!("cuda:{}", gpu.facts.ordinal);
        let head = std::iter::once("copies, GB/s".into()).chain(self.gpus.iter().map(name));
        let row = |from: &Gpu| {
            let cell = |to: &Gpu| {
                let between = |l: &&Link| (l.from, l.to) == (from.facts.ordinal, to.facts.ordinal);
                self.links.iter().find(between).map_or("-".into(), link_cell)
            };
            std::iter::once(format!("from {}", name(from))).chain(self.gpus.iter().map(cell)).collect()
        };
        std::iter::once(head.collect()).chain(self.gpus.iter().map(row)).collect()
    }
}

fn link_cell(link: &Link) -> String {
    let kind = link.kind.name();
    match (link.intact, link.copy_gb_per_s) {
        (Some(false), _) => format!("{kind}: damaged"),
        (_, Some(rate)) => format!("{kind} {rate:.0}"),
        (_, None) => kind.into(),
    }
}

fn measured(rate: Option<f64>) -> String {
    rate.map_or("-".into(), |rate| format!("{rate:.0}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::{DeviceFacts, LinkKind};

    fn gpu(ordinal: usize, free: Option<usize>) -> Gpu {
        let facts = DeviceFacts {
            ordinal,
            name: "Some GPU".into(),
            compute: (9, 0),
            memory_bytes: 80_000_000_000,
            multiprocessors: 100,
            l2_bytes: 50_000_000,
            shared_per_block_max: 1 << 16,
        };
        let arch = facts.arch();
        let rate = free.map(|_| 1234.5);
        Gpu { facts, arch, memory_free_bytes: free, copy_gb_per_s: rate, matmul_bf16_tflop_per_s: rate }
    }

    fn link(from: usize, to: usize, kind: LinkKind, rate: Option<f64>, intact: Option<bool>) -> Link {
        let (peer_access, native_atomics) = (kind != LinkKind::Host, kind == LinkKind::Nvlink);
        let performance_rank = 0;
        Link { from, to, peer_access, kind, performance_rank, native_atomics, copy_gb_per_s: rate, intact }
    }

    fn machine() -> Machine {
        let cpu = CpuFacts { name: "Some CPU".into(), cores: 2, instructions: "avx2" };
        let gpus = vec![gpu(0, Some(70_000_000_000)), gpu(1, None)];
        let links = vec![
            link(0, 1, LinkKind::Nvlink, Some(394.2), Some(true)),
            link(1, 0, LinkKind::Pcie, Some(20.0), Some(false)),
        ];
        Machine { cpu, gpus, links, no_gpu: None }
    }

    #[test]
    fn gpus_and_links_are_tables() {
        let want = "\
cpu  Some CPU, 2 cores, avx2

gpu         name  memory GB  free    arch  multiprocessors  L2 MB  copy GB/s  bf16 TFLOP/s
cuda:0  Some GPU       80.0  70.0  sm_90a              100   50.0       1234          1234
cuda:1  Some GPU       80.0     -  sm_90a              100   50.0          -             -

copies, GB/s         cuda:0      cuda:1
from cuda:0               -  NVLink 394
from cuda:1  PCIe: damaged           -
";
        let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
        let table = machine().table();
        assert_eq!(words(&table), words(want), "{table}");
        let one = Machine { gpus: vec![gpu(0, None)], links: Vec::new(), ..machine() };
        assert!(!one.table().contains("copies"), "one GPU has no links");
        assert_eq!(link_cell(&link(0, 1, LinkKind::Host, None, None)), "host");
    }

    #[test]
    fn json_has_the_facts_beside_the_figures() {
        let json = serde_json::to_value(machine()).unwrap();
        assert_eq!((&json["gpus"][1]["ordinal"], &json["gpus"][1]["arch"]), (&1.into(), &"sm_90a".into()));
        assert_eq!(
            (&json["links"][0]["kind"], &json["links"][0]["intact"]),
            (&"nvlink".into(), &true.into())
        );
        assert!(json.get("no_gpu").is_none());
    }
}
