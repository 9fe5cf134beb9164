//! How good a trained model is.

use super::optimizer::{Job, Trainer};
use serde::Serialize;
use tch::nn::VarStore;
use tch::{Kind, Tensor};
use tch_blr::{Result, metrics};

/// Which way is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    Higher,
    Lower,
}

/// One number of a trained model.
#[derive(Debug, Serialize)]
pub(crate) struct Measure {
    pub(crate) name: &'static str,
    pub(crate) better: Better,
    /// At the weights that the program would save.
    pub(crate) at_mean: f64,
    /// Of predictions that are averaged over samples of the posterior.
    pub(crate) averaged: Option<f64>,
}

impl Measure {
    /// Of a model that makes no predictions to average.
    pub(crate) fn of_point(name: &'static str, better: Better, value: f64) -> Self {
        Measure { name, better, at_mean: value, averaged: None }
    }
}

/// What a program reports: its quality first, then what else there is.
#[derive(Debug, Serialize)]
pub(crate) struct Scores {
    pub(crate) measures: Vec<Measure>,
    /// Of all its optimizers together.
    pub(crate) seconds_per_step: f64,
}

impl Scores {
    pub(crate) fn new(measures: impl Into<Vec<Measure>>, trainers: &[&Trainer]) -> Self {
        Scores { measures: measures.into(), seconds_per_step: trainers.iter().map(|t| t.seconds_per_step()).sum() }
    }
}

/// Class probabilities of a trained model, `[N, C]`.
#[derive(Debug)]
pub(crate) struct Predictions {
    at_mean: Tensor,
    averaged: Option<Tensor>,
}

impl Predictions {
    /// From the logits of fixed inputs: once at the mean, and averaged over samples where there is a posterior.
    pub(crate) fn of(job: &Job, trained: &Trainer, vs: &VarStore, logits: impl Fn() -> Tensor) -> Result<Self> {
        let probabilities = || tch::no_grad(|| logits().softmax(-1, Kind::Float));
        let averaged = trained.posterior().map(|q| q.predict(vs, job.samples(), probabilities)).transpose()?;
        Ok(Predictions { at_mean: probabilities(), averaged: averaged.map(|p| p.mean) })
    }

    /// A number of the probabilities of either kind.
    pub(crate) fn measure(
        &self,
        name: &'static str,
        better: Better,
        of: impl Fn(&Tensor) -> Result<f64>,
    ) -> Result<Measure> {
        let averaged = self.averaged.as_ref().map(&of).transpose()?;
        Ok(Measure { name, better, at_mean: of(&self.at_mean)?, averaged })
    }

    /// In percent.
    pub(crate) fn accuracy(&self, labels: &Tensor) -> Result<Measure> {
        self.measure("accuracy, %", Better::Higher, |p| Ok(100.0 * metrics::accuracy(p, labels)?))
    }

    /// In nats per label.
    pub(crate) fn nll(&self, labels: &Tensor) -> Result<Measure> {
        self.measure("NLL", Better::Lower, |p| metrics::nll(p, labels))
    }

    /// Expected calibration error, in percent.
    pub(crate) fn ece(&self, labels: &Tensor) -> Result<Measure> {
        self.measure("ECE, %", Better::Lower, |p| Ok(100.0 * metrics::ece(p, labels, 15)?))
    }
}
