//! Federated averaging.

use super::dual::Dual;
use super::method::{Answer, Client, Problem, Rule, State};
use super::moments::Moments;
use crate::Result;
use serde::{Deserialize, Serialize};

/// Federated averaging: every client trains on from the server's weights, and the server averages.
///
/// ```text
/// client   from θ = w:  l_k(θ) + ½ (N_k/N) ‖θ-m₀‖²_{S₀}        a few epochs, not to the end
/// server   w = Σ_k (N_k/N) θ_k                                  over the clients that answered
/// ```
///
/// The prior is divided among the clients, so that their losses add up to the one we want. Nothing else holds a client
/// near w, so it must stop early: trained to the end, every round gives the same weights. There is no dual. The
/// server's precision stays that of the prior, and means nothing.
///
/// Source: McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data* (AISTATS 2017).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct FedAvg;

impl Rule for FedAvg {
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn problem(&self, server: &State, client: &Client) -> Problem {
        let prior = server.prior.times(client.examples / server.examples);
        Problem { ess: client.examples, prior, share: Dual::zero(&server.prior) }
    }

    fn dual(&self, server: &State, _: &Client, _: &Moments) -> Dual {
        Dual::zero(&server.prior)
    }

    fn posterior(&self, server: &State, _: &[&Dual], answers: &[Answer]) -> Result<Moments> {
        let n: f64 = answers.iter().map(|a| a.examples).sum();
        let sum = answers.iter().fold(server.prior.mean.zeros_like(), |sum, a| sum + &a.q.mean * (a.examples / n));
        Ok(server.prior.around(&sum))
    }
}
