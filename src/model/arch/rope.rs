//! Rotary positions: config.json's two spellings, and the scalings of frequencies, computed in f32 in the
//! order of operations of transformers.

use std::f64::consts::PI;

use crate::{
    error::{Result, shown},
    model::{config::Config, spec::Rope},
};

/// Reads `rope_scaling` or `rope_parameters`, and `rope_theta` in or beside it, or else `theta`.
pub(super) fn read(config: &Config, head_dim: usize, context_max: usize, theta: f64) -> Result<Rope> {
    let section = section(config)?;
    let one = |section: &Config| one(config, section, &Plain { head_dim, context_max, theta });
    let mut ropes = Vec::new();
    for kind in ["full_attention", "sliding_attention"] {
        if let Some(section) = section.object(kind)? {
            ropes.push(one(&section)?);
        }
    }
    match &ropes[..] {
        [] => one(&section),
        [a, b] if a != b => {
            Err(section.error("sliding_attention", "it differs from full_attention, which is not supported"))
        }
        _ => Ok(ropes.swap_remove(0)),
    }
}

/// How many frequencies turn by time, by the place down and by the place across: `mrope_section`.
pub(super) fn sections(config: &Config, head_dim: usize) -> Result<[usize; 3]> {
    const KEY: &str = "mrope_section";
    let section = section(config)?;
    let given = section.ids(KEY)?.unwrap_or_else(|| vec![16, 24, 24]);
    let whole = |s: &[usize; 3]| s.iter().sum::<usize>() == head_dim / 2;
    let sections = given.iter().map(|&n| n as usize).collect::<Vec<_>>().try_into().ok().filter(whole);
    sections.ok_or_else(|| {
        let half = head_dim / 2;
        section.error(KEY, format!("{given:?} are not three numbers of frequencies, {half} together"))
    })
}

/// Where the parameters are.
fn section(config: &Config) -> Result<Config> {
    let given = |key: &str| Ok(config.object(key)?.filter(|section| !section.is_empty()));
    let section = match given("rope_scaling")? {
        Some(section) => Some(section),
        None => given("rope_parameters")?,
    };
    Ok(section.unwrap_or_else(|| config.empty("rope_parameters")))
}

/// What parameters are for.
struct Plain {
    head_dim: usize,
    context_max: usize,
    /// If no other is given.
    theta: f64,
}

/// One set of parameters: those of `section`, with what it leaves to `config`.
fn one(config: &Config, section: &Config, plain: &Plain) -> Result<Rope> {
    let &Plain { head_dim, context_max, theta } = plain;
    const THETA: &str = "rope_theta";
    let place = if section.has(THETA) { section } else { config };
    let theta = place.number(THETA)?.unwrap_or(theta);
    if theta <= 1.0 {
        return Err(place.error(THETA, format!("{theta} is not above 1")));
    }
    for place in [section, config] {
        if let Some(part) = place.number("partial_rotary_factor")?.filter(|&part| part != 1.0) {
            return Err(place.error("partial_rotary_factor", format!("{part} is not supported, only 1")));
        }
    }
    let powers = powers(theta, head_dim);
    let plain: Vec<f32> = powers.iter().map(|&p| 1.0 / p).collect();
    let key = if section.has("rope_type") { "rope_type" } else { "type" };
    let scaling = Scaling { config, section, context_max };
    let (inv_freq, scale) = match section.text(key)?.unwrap_or("default") {
        // With sections: see `sections`.
        "default" | "mrope" => (plain, 1.0),
        "linear" => (scaling.linear(&plain)?, 1.0),
        "llama3" => (scaling.llama3(&plain)?, 1.0),
        "yarn" => scaling.yarn(theta, &powers)?,
        other => {
            let known = "known: default, linear, llama3, yarn";
            return Err(section.error(key, format!("\"{}\" is not known ({known})", shown(other))));
        }
    };
    if !inv_freq.iter().chain([&scale]).all(|x| x.is_finite()) {
        return Err(section.error(key, "its parameters give frequencies that are not finite"));
    }
    Ok(Rope { inv_freq, scale })
}

/// `theta ^ (2i / head_dim)`. PyTorch's powers are rounded correctly but for one in hundreds; f32's `powf`
/// here is not, hence f64.
fn powers(theta: f64, head_dim: usize) -> Vec<f32> {
    let theta = f64::from(theta as f32);
    (0..head_dim).step_by(2).map(|i| theta.powf(f64::from(i as f32 / head_dim as f32)) as f32).collect()
}

struct Scaling<'a> {
    config: &'a Config,
    section: &'a Config,
    context_max: usize,
}

impl Scaling<'_> {
    fn linear(&self, plain: &[f32]) -> Result<Vec<f32>> {
        let factor = self.needed("factor")? as f32;
        Ok(plain.iter().map(|f| f / factor).collect())
    }

    /// Divides low frequencies, keeps high ones and blends those between.
    fn llama3(&self, plain: &[f32]) -> Result<Vec<f32>> {
        let (low, high) = (self.needed("low_freq_factor")?, self.needed("high_freq_factor")?);
        if high <= low {
            let why = format!("{high} is not above low_freq_factor, {low}");
            return Err(self.section.error("high_freq_factor", why));
        }
        let factor = self.needed("factor")? as f32;
        let context = self.original_context()?;
        let (longest, shortest) = ((context / low) as f32, (context / high) as f32);
        let (context, low, span) = (context as f32, low as f32, (high - low) as f32);
        let scaled = |&f: &f32| {
            // A number over a tensor is a reciprocal and a product in PyTorch.
            let wavelength = (1.0 / f) * (2.0 * PI) as f32;
            if wavelength > longest {
                f / factor
            } else if wavelength < shortest {
                f
            } else {
                let smooth = ((1.0 / wavelength) * context - low) / span;
                (1.0 - smooth) * f / factor + smooth * f
            }
        };
        Ok(plain.iter().map(scaled).collect())
    }

    /// Divides low frequencies, keeps high ones, with a ramp over the pairs between, and scales the rotation.
    fn yarn(&self, theta: f64, powers: &[f32]) -> Result<(Vec<f32>, f32)> {
        let context = self.original_context()?;
        let factor = match self.section.positive("factor")? {
            Some(factor) => factor,
            None => self.context_max as f64 / context,
        };
        let scale = self.yarn_scale(factor)?;
        let rotations = |key: &str, absent: f64| {
            let given = self.section.number(key)?.filter(|&x| x != 0.0).unwrap_or(absent);
            if given > 0.0 { Ok(given) } else { Err(self.section.error(key, format!("{given} is negative"))) }
        };
        let dim = 2.0 * powers.len() as f64;
        let pair = |turns: f64| dim * (context / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut first, mut last) = (pair(rotations("beta_fast", 32.0)?), pair(rotations("beta_slow", 1.0)?));
        if self.section.flag("truncate")?.unwrap_or(true) {
            (first, last) = (first.floor(), last.ceil());
        }
        (first, last) = (first.max(0.0), last.min(dim - 1.0));
        if first == last {
            last += 0.001;
        }
        let (start, span) = (first as f32, (last - first) as f32);
        let ramped = |(i, p): (usize, &f32)| {
            let kept = 1.0 - ((i as f32 - start) / span).clamp(0.0, 1.0);
            let divided = 1.0 / (factor as f32 * p);
            divided * (1.0 - kept) + (1.0 / p) * kept
        };
        Ok((powers.iter().enumerate().map(ramped).collect(), scale))
    }

    fn yarn_scale(&self, factor: f64) -> Result<f32> {
        let of = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        let mscale = |key: &str| Ok(self.section.number(key)?.filter(|&m| m != 0.0));
        let scale = match (
            self.section.positive("attention_factor")?,
            mscale("mscale")?,
            mscale("mscale_all_dim")?,
        ) {
            (Some(given), ..) => given,
            (None, Some(up), Some(down)) => of(up) / of(down),
            _ => of(1.0),
        };
        Ok(scale as f32)
    }

    /// Tokens that the model was first trained for.
    fn original_context(&self) -> Result<f64> {
        const KEY: &str = "original_max_position_embeddings";
        for place in [self.config, self.section] {
            if let Some(tokens) = place.positive(KEY)? {
                return Ok(tokens);
            }
        }
        Ok(self.context_max as f64)
    }

    fn needed(&self, key: &str) -> Result<f64> {
        self.section.required(key, self.section.positive(key)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(text: &str, context_max: usize) -> Result<Rope> {
        read(&Config::parse("config.json", text.as_bytes()).unwrap(), 16, context_max, 10_000.0)
    }

    #[track_caller]
    fn check(text: &str, context_max: usize, scale: f32, inv_freq: [f32; 8]) {
        let rope = rope(text, context_max).unwrap();
        assert_eq!(rope, Rope { inv_freq: inv_freq.to_vec(), scale });
    }

    /// `inv_freq` and `attention_scaling` of transformers 5.17's LlamaRotaryEmbedding, heads of 16 numbers.
    #[test]
    #[rustfmt::skip]
    fn frequencies_are_those_of_transformers() {
        let plain =
            [1.0, 0.23713736, 0.05623413, 0.013335215, 0.0031622779, 0.0007498942, 0.00017782794, 4.2169653e-05];
        check(r#"{"rope_theta": 100000.0}"#, 8192, 1.0, plain);
        check(r#"{"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}"#, 8192, 1.0,
            [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.00079056947, 0.00025, 7.905695e-05]);
        check(r#"{"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"#, 131072, 1.0,
            [1.0, 0.19392276, 0.03760603, 0.007292665, 0.000524846, 3.4281024e-05, 6.6478697e-06, 1.2891732e-06]);
        check(r#"{"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"#, 131072, 1.0,
            [1.0, 0.19392276, 0.03760603, 0.007292665, 0.0004295567, 8.570256e-06, 1.6619674e-06, 3.222933e-07]);
        check(r#"{"rope_theta": 1000000.0, "rope_scaling": {"type": "yarn", "factor": 4.0,
            "original_max_position_embeddings": 32768}}"#, 131072, 1.1386294,
            [1.0, 0.17782794, 0.03162278, 0.00421756, 0.0005, 4.4456985e-05, 7.905694e-06, 1.4058534e-06]);
        check(r#"{"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0,
            "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2, "mscale": 1.0,
            "mscale_all_dim": 0.5, "truncate": false}}"#, 163840, 1.155722,
            [1.0, 0.31622776, 0.1, 0.03162278, 0.0057901046, 0.00012395246, 2.5e-05, 7.9056945e-06]);
    }

    #[test]
    fn spellings_mean_the_same() {
        let same = |texts: &[&str]| {
            let first = rope(texts[0], 4096).unwrap();
            for text in texts {
                assert_eq!(rope(text, 4096).unwrap(), first, "{text}");
            }
        };
        same(&[
            "{}",
            r#"{"rope_theta": 10000, "rope_scaling": null, "rope_parameters": null}"#,
            r#"{"rope_scaling": {}, "rope_parameters": {"rope_theta": 10000.0}}"#,
            r#"{"rope_scaling": {"rope_type": "default", "type": "yarn"}}"#,
        ]);
        same(&[
            r#"{"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}}"#,
            r#"{"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000000}}"#,
            r#"{"rope_theta": 1e6, "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0},
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000000}}}"#,
            r#"{"rope_theta": 1e6, "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": null}}"#,
        ]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let llama3 =
            |more: &str| format!(r#"{{"rope_scaling": {{"rope_type": "llama3", "factor": 8{more}}}}}"#);
        for (text, said) in [
            (r#"{"rope_theta": 0}"#, "config.json: rope_theta: 0 is not above 1"),
            (r#"{"rope_theta": "big"}"#, "rope_theta: \"big\" is not a number of ordinary size"),
            (r#"{"rope_theta": 1e300}"#, "rope_theta: 1e+300 is not a number of ordinary size"),
            (r#"{"rope_parameters": {"rope_theta": -1}}"#, "rope_parameters.rope_theta: -1 is not above 1"),
            (r#"{"rope_parameters": 3}"#, "rope_parameters: 3 is not an object"),
            (
                r#"{"rope_scaling": {"type": "dynamic"}}"#,
                "rope_scaling.type: \"dynamic\" is not known (known: default, linear, llama3, yarn)",
            ),
            (r#"{"rope_scaling": {"type": "linear"}}"#, "rope_scaling.factor: it is missing"),
            (r#"{"rope_scaling": {"type": "linear", "factor": 0}}"#, "rope_scaling.factor: 0 is not"),
            (&llama3(""), "rope_scaling.low_freq_factor: it is missing"),
            (
                &llama3(r#", "low_freq_factor": 4, "high_freq_factor": 4"#),
                "rope_scaling.high_freq_factor: 4 is not above low_freq_factor, 4",
            ),
            (
                r#"{"rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": -1}}"#,
                "rope_scaling.beta_slow: -1 is negative",
            ),
            (r#"{"partial_rotary_factor": 0.5}"#, "partial_rotary_factor: 0.5 is not supported"),
            (
                r#"{"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}}"#,
                "rope_parameters.sliding_attention: it differs from full_attention",
            ),
        ] {
            let message = rope(text, 4096).unwrap_err().to_string();
            assert!(message.contains(said), "{text}: {message}");
        }
    }
}
