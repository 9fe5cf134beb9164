//! A row that is chosen at run time: its name and settings as one serde value.
//!
//! The list of rows at `any_row!` is the only thing here that changes with a new row. The optimizer that comes of it is
//! a [`Train`].

use super::{
    Adam, AdamW, BayesBiNN, BayesianSam, DiagonalNewton, Evon, FullVon, Ivon, Newton, NoisyKfac, RmsProp, Sam,
    SamRmsProp, Sgd, Soap, Ste, Vadam, Von,
};
use crate::driver::Row;
use crate::parallel::Collective;
use crate::{Noise, Params, Prior, Result, Schedule, Train};
use serde::{Deserialize, Serialize};

/// How [`AnyRow::build_with`] builds, beside row and learning rate: what every row's [`Builder`](crate::Builder) takes.
#[derive(Debug, Default)]
pub struct BuildOptions {
    /// As [`Builder::prior`](crate::Builder::prior).
    pub prior: Option<Prior>,
    /// As [`Builder::noise`](crate::Builder::noise).
    pub noise: Option<Noise>,
    /// As [`Builder::schedule`](crate::Builder::schedule).
    pub schedule: Schedule,
    /// As [`Builder::clip_grad_norm`](crate::Builder::clip_grad_norm).
    pub clip_grad_norm: Option<f64>,
    /// As [`Builder::skip_non_finite`](crate::Builder::skip_non_finite).
    pub skip_non_finite: bool,
    /// As [`Builder::parallel`](crate::Builder::parallel).
    pub collective: Option<Box<dyn Collective>>,
}

macro_rules! any_row {
    ($($Row:ident $name:literal)*) => {
        /// The name of a row with its settings, as a serde value: `{"ivon": {"ess": 60000.0}}`, or `"adam"` alone where
        /// the defaults will do.
        ///
        /// Settings that are left out have their defaults. A name or setting that does not exist is an error of
        /// deserialization, which lists those that do. Names are those of checkpoints.
        #[derive(Debug, Clone, Copy, PartialEq, Serialize)]
        #[non_exhaustive]
        pub enum AnyRow {
            $(#[doc = concat!("[`", stringify!($Row), "`](crate::", stringify!($Row), "), `\"", $name, "\"`.")]
            #[serde(rename = $name)]
            $Row($Row),)*
        }

        /// With settings.
        #[derive(Deserialize)]
        enum Full {
            $(#[serde(rename = $name)] $Row($Row),)*
        }

        impl AnyRow {
            /// The names of all rows.
            pub const NAMES: &'static [&'static str] = &[$($name),*];

            /// The row of this name, with its defaults.
            pub fn named(name: &str) -> Option<Self> {
                // Files are written under `NAME`; the same row must not have another name in a configuration.
                $(const { assert!(str_eq($Row::NAME, $name), "AnyRow has a row under another name") };)*
                match name {
                    $($name => Some(AnyRow::$Row($Row::default())),)*
                    _ => None,
                }
            }

            /// Its name.
            pub fn name(&self) -> &'static str {
                match self {
                    $(AnyRow::$Row(_) => $name,)*
                }
            }

            /// Builds the optimizer of this row, as [`Builder::build`](crate::Builder::build) does.
            ///
            /// # Errors
            /// As [`Builder::build`](crate::Builder::build).
            pub fn build_with(
                &self,
                options: BuildOptions,
                params: impl Into<Params>,
                lr: f64,
            ) -> Result<Box<dyn Train>> {
                match *self {
                    $(AnyRow::$Row(row) => boxed(row, options, params.into(), lr),)*
                }
            }
        }

        impl From<Full> for AnyRow {
            fn from(full: Full) -> Self {
                match full {
                    $(Full::$Row(row) => AnyRow::$Row(row),)*
                }
            }
        }

        $(impl From<$Row> for AnyRow {
            fn from(row: $Row) -> Self {
                AnyRow::$Row(row)
            }
        })*
    };
}

any_row! {
    Sgd "sgd"
    RmsProp "rmsprop"
    Adam "adam"
    AdamW "adamw"
    Von "von"
    Ivon "ivon"
    Sam "sam"
    SamRmsProp "sam_rmsprop"
    BayesianSam "bsam"
    Vadam "vadam"
    Ste "ste"
    BayesBiNN "bayesbinn"
    Newton "newton"
    DiagonalNewton "diagonal_newton"
    FullVon "full_von"
    Evon "evon"
    Soap "soap"
    NoisyKfac "noisy_kfac"
}

/// `==` of texts; that of `str` cannot be used in a constant.
const fn str_eq(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    a.len() == b.len() && i == a.len()
}

fn boxed<R: Row>(row: R, options: BuildOptions, params: Params, lr: f64) -> Result<Box<dyn Train>> {
    let BuildOptions { prior, noise, schedule, clip_grad_norm, skip_non_finite, collective } = options;
    let mut builder = row.builder().schedule(schedule);
    if let Some(prior) = prior {
        builder = builder.prior(prior);
    }
    if let Some(noise) = noise {
        builder = builder.noise(noise);
    }
    if let Some(max) = clip_grad_norm {
        builder = builder.clip_grad_norm(max);
    }
    if skip_non_finite {
        builder = builder.skip_non_finite();
    }
    if let Some(collective) = collective {
        builder = builder.parallel(collective);
    }
    Ok(Box::new(builder.build(params, lr)?))
}

impl AnyRow {
    /// Builds the optimizer of this row for these parameters with this learning rate.
    ///
    /// # Errors
    /// As [`Builder::build`](crate::Builder::build).
    pub fn build(&self, params: impl Into<Params>, lr: f64) -> Result<Box<dyn Train>> {
        self.build_with(BuildOptions::default(), params, lr)
    }
}

impl<'de> Deserialize<'de> for AnyRow {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct NameOrSettings;

        impl<'de> serde::de::Visitor<'de> for NameOrSettings {
            type Value = AnyRow;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("the name of a row, or a map of one name to its settings")
            }
            fn visit_str<E: serde::de::Error>(self, name: &str) -> std::result::Result<AnyRow, E> {
                AnyRow::named(name).ok_or_else(|| E::unknown_variant(name, AnyRow::NAMES))
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> std::result::Result<AnyRow, A::Error> {
                // Derived code reads the settings, so that unknown names and fields are reported as everywhere in
                // serde.
                Full::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(AnyRow::from)
            }
        }

        // Either form may come, so this takes a format that describes itself, as JSON and TOML do.
        deserializer.deserialize_any(NameOrSettings)
    }
}
