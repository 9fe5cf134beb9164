//! The experiment of `--example federated`, small: every method learns from clients that see two digits each.

use tch::Tensor;
use tch_blr::federated::{BayesAdmm, FedAvg, FisherMerge, Method, PosteriorMerge, Pvi};
use tch_blr_examples::batches::subset;
use tch_blr_examples::federation::{Budget, Federation, Plan};

fn plan(method: impl Into<Method>, lr: f64) -> Plan {
    Plan { name: "test", method: method.into(), lr, prior_precision: 100.0, temperature: 0.1 }
}

/// Every digit is at two clients, and every example at one.
#[test]
fn clients_have_two_digits_each() {
    let data = Federation::handwritten().unwrap();
    assert_eq!(data.clients.len(), 10);
    let all = data.clients.iter().map(|(_, (x, _))| x.size()[0]).sum::<i64>();
    assert_eq!(all, 386);
    for (k, (name, (x, y))) in (0..).zip(&data.clients) {
        let [a, b] = [k, (k + 1) % 10].map(|digit| subset(y, &[digit]).size()[0]);
        assert!(a > 10 && b > 10 && a + b == x.size()[0], "{name}: {a}, {b}");
    }
    let rows = Tensor::cat(&data.clients.iter().map(|(_, (x, _))| x.shallow_clone()).collect::<Vec<_>>(), 0);
    let different = rows.unique_dim(0, true, false, false).0.size()[0];
    assert!(different > 380, "{different}");
}

#[test]
fn every_method_learns_all_digits() {
    let data = Federation::handwritten().unwrap();
    let budget = Budget { rounds: 4, epochs: 4, batch: 10, hidden: 20, samples: 4 };
    for plan in [
        plan(FedAvg, 0.1),
        plan(PosteriorMerge, 0.02),
        plan(FisherMerge, 0.005),
        plan(Pvi { damping: 0.1 }, 0.02),
        plan(BayesAdmm { rho: 0.2, damping: 0.5, temperature: 1.0 }, 0.02),
    ] {
        let scores = plan.run(&data, &data.test, &budget, 0).unwrap();
        let (first, last) = (scores[0], scores[4]);
        println!("{:?}: {first:?}, {last:?}", plan.method);
        assert_eq!(scores.len(), 5);
        // A client by itself knows two digits of ten.
        assert!(last.accuracy > 0.25, "{:?}: {last:?}", plan.method);
        // Multiplying again and again becomes ever surer of what it knows no better: docs/federated.md.
        let merges = matches!(plan.method, Method::PosteriorMerge(_));
        assert!(merges || last.nll < first.nll, "{:?}: {last:?}", plan.method);
        let again = plan.run(&data, &data.test, &budget, 0).unwrap();
        assert_eq!((again[4].nll, again[4].predictive_nll), (last.nll, last.predictive_nll));
    }
}
