//! Methods and their settings, as options and as keys of a recipe file: one definition of both.

use crate::Outcome;
use blr_merge::{Keep, Method, Rescale, TaskVectors};
use clap::{Args, ValueEnum};
use serde::Deserialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Name {
    /// The mean of the models.
    Average,
    /// The mean, weighted by --weight.
    Linear,
    /// From the first model to the second at constant angular speed.
    Slerp,
    /// The mean on the sphere of any number of models, weighted by --weight.
    Karcher,
    /// base + lambda · sum of weight · (model - base).
    TaskArithmetic,
    /// Task arithmetic with the largest differences, where their signs agree.
    Ties,
    /// Task arithmetic with randomly chosen, rescaled differences.
    Dare,
    /// TIES with randomly chosen, rescaled differences.
    DareTies,
    /// TIES with randomly chosen, rescaled differences, of which the larger are likelier.
    Della,
    /// Task arithmetic without the smallest and the largest differences.
    Breadcrumbs,
    /// Between the base and the mean of fine-tunes for one task, by the angles between these.
    ModelStock,
    /// The differences where the models differ most, weighted by their squares, where their signs agree.
    Sce,
    /// The mean, weighted by --weight and curvature.
    Fisher,
    /// Task arithmetic that accounts for curvature (Daheim et al. 2024).
    GradientMatching,
    /// The sum of posteriors' natural parameters, weighted by --weight, which may be negative.
    Combine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// By 1/density, which is unbiased.
    Density,
    /// By what keeps the L1 norm of each tensor's difference.
    L1,
}

/// A method, and what may be set of it. What is not given has the method's default.
#[derive(Debug, Clone, Default, PartialEq, Args, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub struct Settings {
    /// How to merge.
    #[arg(id = "method", long, short, value_name = "METHOD")]
    pub name: Option<Name>,
    /// Factor on the sum of differences [default: 1].
    #[arg(long, allow_negative_numbers = true)]
    lambda: Option<f64>,
    /// Fraction of each difference that is kept, in (0, 1]; required by ties, dare, dare-ties, della and sce.
    #[arg(long)]
    density: Option<f64>,
    /// By how much della keeps the largest differences more often than the smallest: with probabilities of density ±
    /// epsilon/2; required by it.
    #[arg(long)]
    epsilon: Option<f64>,
    /// Fraction of each difference, its smallest elements, that breadcrumbs drops; required by it.
    #[arg(long)]
    beta: Option<f64>,
    /// Fraction of each difference, its largest elements, that breadcrumbs drops; required by it.
    #[arg(long)]
    gamma: Option<f64>,
    /// How dare rescales what it keeps, to make up for what it drops [default: density].
    #[arg(long)]
    rescale: Option<Scale>,
    /// Decides, together with the names of tensors and models, what dare and della keep [default: 0].
    #[arg(long)]
    seed: Option<u64>,
    /// Where slerp stops, 0 for the first model and 1 for the second [default: 0.5].
    #[arg(short, allow_negative_numbers = true)]
    t: Option<f64>,
    /// Do not divide by the sum of weights (linear, ties, dare-ties, della).
    #[arg(long, num_args = 0, default_missing_value = "true")]
    no_normalize: Option<bool>,
    /// Added to the curvature of the base [default: 1e-12].
    #[arg(long)]
    delta: Option<f64>,
    /// Take the information that a posterior has beyond its base as at least 0, in each weight (gradient-matching of
    /// posteriors); without it, a merged precision that is not positive is an error.
    #[arg(long, num_args = 0, default_missing_value = "true")]
    clamp: Option<bool>,
}

impl Name {
    pub fn uses_weights(self) -> bool {
        !matches!(self, Name::Average | Name::Slerp | Name::ModelStock | Name::Sce)
    }

    pub fn uses_base(self) -> bool {
        self.differences() || matches!(self, Name::ModelStock | Name::Sce | Name::GradientMatching)
    }

    pub fn uses_curvature(self) -> bool {
        matches!(self, Name::Fisher | Name::GradientMatching | Name::Combine)
    }

    fn differences(self) -> bool {
        matches!(self, Name::TaskArithmetic | Name::Breadcrumbs) || self.sparse()
    }

    fn sparse(self) -> bool {
        matches!(self, Name::Ties | Name::Dare | Name::DareTies | Name::Della)
    }
}

impl Settings {
    /// These, and where they say nothing, the general ones. Another method has nothing to do with the general one's
    /// settings.
    pub fn over(&self, general: &Settings) -> Settings {
        if self.name.is_some_and(|name| general.name != Some(name)) {
            return self.clone();
        }
        Settings {
            name: general.name,
            lambda: self.lambda.or(general.lambda),
            density: self.density.or(general.density),
            epsilon: self.epsilon.or(general.epsilon),
            beta: self.beta.or(general.beta),
            gamma: self.gamma.or(general.gamma),
            rescale: self.rescale.or(general.rescale),
            seed: self.seed.or(general.seed),
            t: self.t.or(general.t),
            no_normalize: self.no_normalize.or(general.no_normalize),
            delta: self.delta.or(general.delta),
            clamp: self.clamp.or(general.clamp),
        }
    }

    /// The method with its settings. A setting that the method does not use is an error, not ignored: whoever gives it
    /// expects it to do something. `curvatures`: whether these are in files of their own, and so never negative.
    pub fn method(&self, curvatures: bool) -> Outcome<Method> {
        use Name::{
            Average, Breadcrumbs, Combine, Dare, DareTies, Della, Fisher, GradientMatching, Karcher, Linear,
            ModelStock, Sce, Slerp, TaskArithmetic, Ties,
        };
        let name = self.name.ok_or("there is no method: give one (--method, or name in [method])")?;
        let random = matches!(name, Dare | DareTies);
        let elect_signs = matches!(name, Ties | DareTies | Della);
        for (setting, given, used) in [
            ("lambda", self.lambda.is_some(), name.differences()),
            ("density", self.density.is_some(), name.sparse() || name == Sce),
            ("epsilon", self.epsilon.is_some(), name == Della),
            ("beta", self.beta.is_some(), name == Breadcrumbs),
            ("gamma", self.gamma.is_some(), name == Breadcrumbs),
            ("rescale", self.rescale.is_some(), random),
            ("seed", self.seed.is_some(), random || name == Della),
            ("t", self.t.is_some(), name == Slerp),
            ("no-normalize", self.no_normalize.is_some(), name == Linear || elect_signs),
            ("delta", self.delta.is_some(), name == GradientMatching),
            ("clamp", self.clamp.is_some(), name == GradientMatching && !curvatures),
        ] {
            if given && !used {
                return Err(unused(setting).into());
            }
        }
        let needed = |setting: Option<f64>, name: &str, range: &str| {
            setting.ok_or_else(|| format!("this method needs {name}, a number {range}"))
        };
        let density = || needed(self.density, "density", "in (0, 1]");
        let seed = self.seed.unwrap_or(0);
        let lambda = self.lambda.unwrap_or(1.0);
        let normalize = self.no_normalize != Some(true);
        let keep = match name {
            Ties => Keep::Largest { density: density()? },
            Dare | DareTies => {
                let rescale = if self.rescale == Some(Scale::L1) { Rescale::L1Norm } else { Rescale::Density };
                Keep::Random { density: density()?, rescale, seed }
            }
            Della => {
                let epsilon = needed(self.epsilon, "epsilon", "≥ 0 (density ± epsilon/2 are its probabilities)")?;
                Keep::Ranked { density: density()?, epsilon, seed }
            }
            Breadcrumbs => Keep::Middle {
                smallest: needed(self.beta, "beta", "in [0, 1), the part of the smallest that is dropped")?,
                largest: needed(self.gamma, "gamma", "in [0, 1), the part of the largest that is dropped")?,
            },
            _ => Keep::All,
        };
        Ok(match name {
            Average => Method::linear(),
            Linear => Method::Linear { normalize },
            Slerp => Method::Slerp { t: self.t.unwrap_or(0.5) },
            Karcher => Method::Karcher,
            TaskArithmetic | Ties | Dare | DareTies | Della | Breadcrumbs => {
                Method::TaskVectors(TaskVectors { lambda, keep, elect_signs, normalize: normalize && elect_signs })
            }
            ModelStock => Method::ModelStock,
            Sce => Method::Sce { density: density()? },
            Fisher => Method::Fisher,
            GradientMatching => {
                Method::GradientMatching { delta: self.delta.unwrap_or(1e-12), clamp: self.clamp == Some(true) }
            }
            Combine => Method::Combine,
        })
    }
}

pub fn unused(setting: &str) -> String {
    format!("{setting} has no part in this method; leave it out")
}
