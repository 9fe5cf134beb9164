//! The number of threads changes neither noise nor weights. Alone in its binary, because the number belongs to the
//! process.

use support::rows::{self, Case};
use support::{F64, assert_close, bits, store, variable, wave_at};
use tch::{Kind, Tensor};
use tch_blr::rule::Rule;
use tch_blr::{DiagonalGaussian, Given, Philox};

/// Weights enough for libtorch to share its work out.
const WEIGHTS: i64 = 300_000;
/// Weights enough for the kernel to take three threads, and no round number.
const MANY_WEIGHTS: i64 = 800_017;

/// Weights after each of two steps, the second of which finds a state, and where the loss was evaluated.
fn run<R: Rule>(row: &Case<R>, weights: i64, threads: i32) -> (Vec<Tensor>, Vec<Vec<u8>>) {
    tch::set_num_threads(threads);
    assert_eq!(tch::get_num_threads(), threads);
    let vs = store(F64);
    let w = variable(&vs, "w", 0, &wave_at(&[weights], 0.0, F64));
    let mut opt = (row.make)(&vs).noise(Philox { seed: 3 }).build(&vs, row.lr).unwrap();
    let (mut weights, mut points) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        opt.step(|| {
            points.push(bits(&w));
            let losses = |target: f64| (&w - target).square().mean(Kind::Double);
            Tensor::stack(&[losses(0.3), losses(-0.1)], 0)
        })
        .unwrap();
        weights.push(w.detach().copy());
    }
    (weights, points)
}

fn check<R: Rule>(row: &Case<R>) {
    check_with(row, WEIGHTS);
}

fn check_with<R: Rule>(row: &Case<R>, weights: i64) {
    let (one, points_of_one) = run(row, weights, 1);
    for threads in [2, 3] {
        let (many, points_of_many) = run(row, weights, threads);
        for (a, b) in many.iter().zip(&one) {
            assert_close(a, b, 1e-12);
        }
        // The first step starts from the same weights, so its points show the noise.
        assert!(points_of_many[0] == points_of_one[0], "{threads} threads: other noise");
        assert_eq!(points_of_many.len(), points_of_one.len());
    }
}

/// Samples of a posterior, bit by bit, in both kinds and in tensors that the threads' pieces do not divide.
fn check_samples() {
    for kind in [Kind::Float, Kind::Double] {
        let entries = [("a", MANY_WEIGHTS - 100_033), ("b", 33), ("c", 100_000)].map(|(name, n)| {
            let ones = Tensor::ones([n], (kind, tch::Device::Cpu));
            (name, &ones * 0.5, ones * 3.0)
        });
        let q = DiagonalGaussian::new(entries).unwrap();
        let sample = |threads| {
            tch::set_num_threads(threads);
            q.sample(5).unwrap().iter().map(|(_, theta)| bits(theta)).collect::<Vec<_>>()
        };
        let one = sample(1);
        for threads in [2, 3] {
            assert!(sample(threads) == one, "{threads} threads: another sample in {kind:?}");
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same() {
    check(&rows::sgd_nesterov());
    check(&rows::rmsprop());
    check(&rows::adam_amsgrad());
    check(&rows::adamw());
    check(&rows::ogn());
    check(&rows::vogn());
    check(&rows::neurips2019());
    check(&rows::von_price());
    check_with(&rows::ivon(), MANY_WEIGHTS);
    check(&rows::ivon_antithetic());
    check(&rows::ivon_prior());
    check_samples();
    check(&rows::sam());
    check(&rows::sam_rmsprop());
    check(&rows::bsam());
    let zeros = Given(vec![vec![vec![Tensor::zeros([WEIGHTS], (Kind::Double, tch::Device::Cpu))]]]);
    let vs = store(F64);
    let w = variable(&vs, "w", 0, &wave_at(&[WEIGHTS], 0.0, F64));
    let mut opt = (rows::ivon().make)(&vs).noise(zeros).build(&vs, 0.0).unwrap();
    opt.step(|| {
        assert_eq!(bits(&w), bits(&wave_at(&[WEIGHTS], 0.0, F64)));
        w.square().mean(Kind::Double)
    })
    .unwrap();
}
