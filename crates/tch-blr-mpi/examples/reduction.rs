//! How long ranks take to add up gradients, and what it would bring to do so while they are computed:
//!
//! ```text
//! cargo build --release --workspace --features tch-blr-mpi/mpi --example reduction
//! OMP_NUM_THREADS=1 mpirun -np 2 target/release/examples/reduction
//! OMP_NUM_THREADS=2 target/release/examples/reduction # one process with as many threads
//! ```

use std::time::Instant;
use tch::{Kind, Tensor};
use tch_blr::parallel::Collective;
use tch_blr::rule::Row;
use tch_blr::{Adam, Builder, Ivon};
use tch_blr_examples::Outcome;
use tch_blr_examples::model::Mlp;
use tch_blr_mpi::Mpi;

/// 11.9 million weights.
const NETWORK: [i64; 4] = [784, 3072, 3072, 10];
/// Of each rank.
const BATCH: i64 = 128;
const ROUNDS: usize = 15;

fn main() -> Outcome {
    let mpi = Mpi::new()?;
    for n in [1, 10_000, 100_000, 1_000_000, 12_000_000] {
        let mut x = vec![1.0_f32; n];
        let times = (0..ROUNDS).map(|_| time(&mpi, || mpi.sum_f32(&mut x))).collect::<Result<_, _>>()?;
        report(&mpi, &format!("a sum of {n} f32"), times);
    }
    overlap(&mpi)?;
    // A batch of 256 in all, and one of 128 for each rank.
    for (network, batch) in [([784, 1024, 1024, 10], 256 / mpi.size() as i64), (NETWORK, BATCH)] {
        steps(&mpi, "Adam", &network, batch, || Adam::default().builder())?;
        steps(&mpi, "IVON", &network, batch, || Ivon::default().ess(1e4).builder())?;
    }
    Ok(())
}

/// A batch of one rank.
fn batch(n: i64) -> (Tensor, Tensor) {
    let images = Tensor::rand([n, NETWORK[0]], (Kind::Float, tch::Device::Cpu));
    (images, Tensor::randint(10, [n], (Kind::Int64, tch::Device::Cpu)))
}

/// Whole steps: of all ranks at once, but each for itself; and together.
fn steps<R: Row>(mpi: &Mpi, row: &str, network: &[i64], n: i64, builder: impl Fn() -> Builder<R>) -> Outcome {
    let (images, labels) = batch(n);
    let nets = [(); 2].map(|()| Mlp::new(network));
    let mut alone = builder().build(&nets[0].vs, 1e-3)?;
    let mut together = builder().parallel(mpi.clone()).build(&nets[1].vs, 1e-3)?;
    let mut times: [Vec<f64>; 2] = Default::default();
    for _ in 0..ROUNDS {
        for ((opt, net), times) in [&mut alone, &mut together].into_iter().zip(&nets).zip(&mut times) {
            let step = || opt.step(|| net.logits(&images).cross_entropy_for_logits(&labels)).map(drop);
            times.push(time(mpi, step)?);
        }
    }
    for (what, times) in ["each for itself", "together"].into_iter().zip(times) {
        report(mpi, &format!("a step of {row}, {network:?}, {n} examples per rank, {what}"), times);
    }
    Ok(())
}

/// The gradient of a network, and the sum of as many numbers: one after the other, and at once. tch does not say when
/// the gradient of a layer is there, so that "at once" gets all of it at the beginning: no real loop can do better.
fn overlap(mpi: &Mpi) -> Outcome {
    let net = Mlp::new(&NETWORK);
    let variables = net.vs.trainable_variables();
    let mut x = vec![1.0_f32; variables.iter().map(Tensor::numel).sum()];
    let (images, labels) = batch(BATCH);
    let gradient = || {
        let loss = net.logits(&images).cross_entropy_for_logits(&labels);
        Tensor::f_run_backward(&[loss], &variables, false, false).map(drop)
    };
    gradient()?;
    let mut times: [Vec<f64>; 4] = Default::default();
    // In turn, so that whatever else the machine does meets all of them.
    for _ in 0..ROUNDS {
        times[0].push(time(mpi, || gradient().map_err(tch_blr::Error::from))?);
        times[1].push(time(mpi, || mpi.sum_f32(&mut x))?);
        times[2].push(time(mpi, || gradient().map_err(tch_blr::Error::from).and_then(|()| mpi.sum_f32(&mut x)))?);
        let (other, mut buffer) = (mpi.clone(), std::mem::take(&mut x));
        times[3].push(time(mpi, || {
            let sum = std::thread::spawn(move || other.sum_f32(&mut buffer).map(|()| buffer));
            gradient()?;
            x = sum.join().expect("a sum does not panic")?;
            Ok(())
        })?);
    }
    for (what, times) in ["a gradient", "its sum", "one after the other", "both at once"].into_iter().zip(times) {
        report(mpi, &format!("{} weights, batch {BATCH}: {what}", x.len()), times);
    }
    Ok(())
}

/// From when all ranks begin to when all have come to the end, in seconds.
fn time(mpi: &Mpi, work: impl FnOnce() -> tch_blr::Result<()>) -> tch_blr::Result<f64> {
    mpi.barrier()?;
    let begin = Instant::now();
    work()?;
    mpi.barrier()?;
    Ok(begin.elapsed().as_secs_f64())
}

fn report(mpi: &Mpi, what: &str, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    if mpi.rank() == 0 {
        let [low, median, high] = [0.25, 0.5, 0.75].map(|part| 1e3 * times[(part * times.len() as f64) as usize]);
        println!("{} ranks, {what}: {median:.3} ms ({low:.3} to {high:.3})", mpi.size());
    }
}
