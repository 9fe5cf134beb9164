//! Where seeds come from. A file of its own: libtorch's generator belongs to the process, and other tests draw from it.

use support::{F64, store, values, variable, wave_at};
use tch::Tensor;
use tch::nn::Module;
use tch_blr::rule::Row;
use tch_blr::{DiagonalNewton, Expectation, Labels, NoisyKfac, Statistic, Von, nn};

/// Rows at the mean that draw labels or probes do so from libtorch's seed, like those that draw samples.
#[test]
fn labels_and_probes_follow_the_seed_of_libtorch() {
    fn check<R: Row>(what: &str, row: R, state: &str) {
        let vs = store(F64);
        let layer = nn::Linear { ws: variable(&vs, "w", 0, &wave_at(&[3, 4], 0.3, F64)), bs: None };
        let (x, y) = (wave_at(&[5, 4], 0.7, F64), Tensor::from_slice(&[0_i64, 1, 2, 1, 0]));
        let run = |seed| {
            tch::manual_seed(seed);
            let mut opt = row.builder().build(&vs, 0.0).unwrap();
            opt.step(|| nn::cross_entropy(&layer.forward(&x), &y)).unwrap();
            values(&opt.state("w", state).unwrap())
        };
        let runs = [1, 1, 2].map(run);
        assert_eq!(runs[0], runs[1], "{what}");
        assert_ne!(runs[0], runs[2], "{what}");
    }
    check("labels of OGN", Von::ogn().ess(10.0).hessian(Statistic::Fisher(Labels::Sampled)), "hess");
    check("labels of K-FAC", NoisyKfac::default().expectation(Expectation::Delta), "row_factor");
    let probes = DiagonalNewton::default().weight_decay(1.0).hessian(Statistic::Hutchinson { probes: 1 });
    check("probes", probes, "hess");
}
