//! The settings of every method, and the grid that they were chosen from.

use tch_blr::federated::{BayesAdmm, FedAvg, FisherMerge, Method, PosteriorMerge, Pvi};
use tch_blr_examples::federation::{Budget, Federation, Plan};

const PVI: Method = Method::Pvi(Pvi { damping: 0.1 });
const ADMM: Method = Method::BayesAdmm(BayesAdmm { rho: 2.0, damping: 0.2, temperature: 1.0 });
const MERGE: Method = Method::PosteriorMerge(PosteriorMerge);
const FISHER: Method = Method::FisherMerge(FisherMerge);
const FED_AVG: Method = Method::FedAvg(FedAvg);

/// The best of the grid after ten rounds, by accuracy on validation digits of MNIST.
pub const PLANS: [Plan; 5] = [
    plan("FedAvg", FED_AVG, 0.2, 30.0),
    plan("posterior merge", MERGE, 0.001, 1000.0),
    plan("Fisher merge", FISHER, 0.0003, 10.0),
    plan("PVI", PVI, 0.005, 100.0),
    plan("IVON-ADMM", ADMM, 0.003, 100.0),
];

const fn plan(name: &'static str, method: Method, lr: f64, prior_precision: f64) -> Plan {
    Plan { name, method, lr, prior_precision, temperature: 0.1 }
}

/// Of the runs that choose.
const SEED: u64 = 100;

/// About fifty steps for every client in every round.
pub fn budget(data: &Federation, rounds: usize) -> Budget {
    let examples = data.clients[0].1.1.numel();
    Budget { rounds, epochs: 5, batch: (examples / 10).clamp(1, 50), hidden: 50, samples: 8 }
}

/// Learning rate and precision of the prior: four settings for each method, one seed.
pub fn tune(data: &Federation, budget: &Budget) {
    let four = |lr: [f64; 2], precision: [f64; 2]| lr.map(|lr| precision.map(|s| (lr, s))).concat();
    let averaging = [0.05, 0.1, 0.2, 0.5].map(|lr| (lr, 30.0)).to_vec();
    for (name, method, settings) in [
        ("FedAvg", FED_AVG, averaging),
        ("posterior merge", MERGE, four([0.001, 0.003], [100.0, 1000.0])),
        ("Fisher merge", FISHER, four([0.0003, 0.0005], [10.0, 30.0])),
        ("PVI", PVI, four([0.003, 0.005], [30.0, 100.0])),
        ("IVON-ADMM", ADMM, four([0.003, 0.005], [30.0, 100.0])),
    ] {
        for (lr, precision) in settings {
            // A setting that fails is one that is not chosen.
            let result = plan(name, method, lr, precision).run(data, &data.validation, budget, SEED).map(|scores| {
                let last = scores[budget.rounds];
                format!("{:.1} %, NLL {:.3}", 100.0 * last.accuracy, last.nll)
            });
            println!(
                "  {name:<18} lr {lr:<6} prior precision {precision:<5} {}",
                result.unwrap_or_else(|e| e.to_string())
            );
        }
    }
}
