//! What a method of federated learning has to say, and the choice of one.

use super::dual::Dual;
use super::moments::Moments;
use super::{Admm, BayesAdmm, FedAvg, FedLap, FisherMerge, PosteriorMerge, Pvi};
use crate::Result;
use serde::{Deserialize, Serialize};

/// What the server knows when a round begins.
#[derive(Debug)]
pub(super) struct State {
    /// p₀
    pub prior: Moments,
    /// N(m_g, S_g⁻¹), as the clients were given it.
    pub posterior: Moments,
    /// N, the examples of all clients.
    pub examples: f64,
}

/// What the server knows of one client.
#[derive(Debug)]
pub(super) struct Client {
    /// N_k
    pub examples: f64,
    /// (v_k, V_k)
    pub dual: Dual,
}

/// What a client minimizes: ess · (mean loss) + θᵀv - ½θᵀVθ in expectation, and the divergence from `prior`.
#[derive(Debug)]
pub(super) struct Problem {
    pub ess: f64,
    pub prior: Moments,
    /// (v, V): the client's dual, on the scale of the divergence.
    pub share: Dual,
}

/// A client's posterior, and its number of examples.
#[derive(Debug)]
pub(super) struct Answer<'a> {
    pub examples: f64,
    pub q: &'a Moments,
}

/// One method: three equations, and the ranges of its settings.
pub(super) trait Rule {
    fn validate(&self) -> Result<()>;
    fn problem(&self, server: &State, client: &Client) -> Problem;
    /// (v_k, V_k) after the client's answer.
    fn dual(&self, server: &State, client: &Client, answer: &Moments) -> Dual;
    /// N(m_g, S_g⁻¹) after the answers, with the new duals of all clients.
    fn posterior(&self, server: &State, duals: &[&Dual], answers: &[Answer]) -> Result<Moments>;
}

/// Name of the server's precision in errors.
pub(super) const SERVER: &str = "the server's new precision";

/// A method of federated learning with its settings; [`crate::federated`] has the table.
///
/// As a value of serde it is a name with settings: `{"bayes_admm": {"rho": 1.0, "damping": 0.5, "temperature": 1.0}}`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // Each has the documentation of its settings.
pub enum Method {
    FedAvg(FedAvg),
    PosteriorMerge(PosteriorMerge),
    FisherMerge(FisherMerge),
    Pvi(Pvi),
    FedLap(FedLap),
    BayesAdmm(BayesAdmm),
    Admm(Admm),
}

impl Method {
    pub(super) fn rule(&self) -> &dyn Rule {
        match self {
            Method::FedAvg(m) => m,
            Method::PosteriorMerge(m) => m,
            Method::FisherMerge(m) => m,
            Method::Pvi(m) => m,
            Method::FedLap(m) => m,
            Method::BayesAdmm(m) => m,
            Method::Admm(m) => m,
        }
    }
}

macro_rules! methods {
    ($($Name:ident)*) => {
        $(impl From<$Name> for Method {
            fn from(m: $Name) -> Self {
                Method::$Name(m)
            }
        })*
    };
}
methods!(FedAvg PosteriorMerge FisherMerge Pvi FedLap BayesAdmm Admm);

/// η in (0, 1].
pub(super) fn check_damping(damping: f64) -> Result<()> {
    crate::check::that("damping", damping, damping > 0.0 && damping <= 1.0, "a number in (0, 1]")
}
