//! Several processes train one network on handwritten digits, each on its own part of every batch:
//!
//! ```text
//! cargo build --release --workspace --features tch-blr-mpi/mpi --example distributed
//! mpirun -np 4 target/release/examples/distributed
//! ```
//!
//! Rank 0 then trains another by itself, on whole batches, for comparison.

use std::path::Path;
use tch::{Reduction, Tensor};
use tch_blr::parallel::Collective;
use tch_blr::rule::Row;
use tch_blr::{Builder, DiagonalGaussian, Ivon, Philox, Von, metrics};
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::{Last, batches};
use tch_blr_examples::handwritten::{self, Examples};
use tch_blr_examples::model::Mlp;
use tch_blr_mpi::Mpi;

const FOLDER: &str = "target/distributed";
const NETWORK: [i64; 4] = [64, 100, 100, 10];
/// Of all ranks together.
const BATCH: usize = 64;
const EPOCHS: u64 = 100;
const LR: f64 = 0.01;
/// Of the posterior, to predict with.
const SAMPLES: usize = 64;

/// The first six forms, to train, and eight others.
struct Data {
    train: Examples,
    test: Examples,
}

impl Data {
    fn new() -> Outcome<Data> {
        let (all, size) = (handwritten::all()?, 776);
        let part = |from, n| Examples { images: all.images.narrow(0, from, n), labels: all.labels.narrow(0, from, n) };
        Ok(Data { train: part(0, size), test: part(size, all.len() as i64 - size) })
    }

    fn steps(&self) -> u64 {
        self.train.len().div_ceil(BATCH) as u64 * EPOCHS
    }
}

/// What came of one training on one rank.
struct Trained {
    examples: i64,
    /// Mean over the last epoch, of all ranks.
    loss: f64,
    /// At the mean of the posterior.
    accuracy: f64,
    /// Averaged over the posterior.
    averaged: [f64; 2],
    posterior: DiagonalGaussian,
}

fn main() -> Outcome {
    let mpi = Mpi::new()?;
    let data = Data::new()?;
    compare("IVON", &mpi, &data, || Ivon::auto(data.train.len() as f64, data.steps()))?;
    compare("VOGN", &mpi, &data, || Von::auto(data.train.len() as f64, data.steps()))
}

/// Trains on all ranks and on one.
fn compare<R: Row<Posterior = DiagonalGaussian>>(
    name: &str,
    mpi: &Mpi,
    data: &Data,
    builder: impl Fn() -> Builder<R>,
) -> Outcome {
    let (rank, size) = (mpi.rank(), mpi.size());
    let together = train(builder().parallel(mpi.clone()), data, (rank, size))?;
    // One after the other, in order.
    for turn in 0..size {
        if turn == rank {
            let Trained { examples, loss, accuracy, .. } = &together;
            println!("{name}, rank {rank} of {size}: {examples} examples, loss {loss:.4}, accuracy {accuracy:.4}");
        }
        mpi.barrier()?;
    }
    if rank > 0 {
        return Ok(());
    }
    let alone = train(builder(), data, (0, 1))?;
    for (who, Trained { accuracy, averaged: [averaged, nll], .. }) in [("together", &together), ("one alone", &alone)] {
        println!("{name}, {who}: accuracy {accuracy:.4}, {averaged:.4} averaged over the posterior, NLL {nll:.4}");
    }
    let path = Path::new(FOLDER).join(format!("{}.safetensors", name.to_lowercase()));
    std::fs::create_dir_all(FOLDER)?;
    together.posterior.save(&path)?;
    println!("{name}: the posterior is in {}", path.display());
    Ok(())
}

fn train<R: Row<Posterior = DiagonalGaussian>>(
    builder: Builder<R>,
    Data { train, test }: &Data,
    (rank, size): (usize, usize),
) -> Outcome<Trained> {
    tch::manual_seed(1 + rank as i64); // the ranks begin with the weights of rank 0
    let net = Mlp::new(&NETWORK);
    let mut opt = builder.noise(Philox { seed: 1 }).build(&net.vs, LR)?;
    let (mut examples, mut loss) = (0, 0.0);
    for epoch in 0..EPOCHS {
        let mut losses = Vec::new();
        for (x, y) in batches(&train.images, &train.labels, BATCH, epoch, Last::Keep) {
            let [x, y] = [part(&x, rank, size), part(&y, rank, size)];
            // A loss for each example, so that ranks count by how many they have.
            losses
                .push(opt.step(|| net.logits(&x).cross_entropy_loss::<Tensor>(&y, None, Reduction::None, -100, 0.0))?);
            examples += y.size()[0];
        }
        loss = losses.iter().sum::<f64>() / losses.len() as f64;
    }
    let posterior = opt.posterior()?;
    let p = posterior.predict(&net.vs, SAMPLES, || net.probabilities(&test.images))?.mean;
    Ok(Trained {
        examples,
        loss,
        accuracy: metrics::accuracy(&net.probabilities(&test.images), &test.labels)?,
        averaged: [metrics::accuracy(&p, &test.labels)?, metrics::nll(&p, &test.labels)?],
        posterior,
    })
}

/// The rows of one rank; parts differ by at most one row, and may be empty.
fn part(rows: &Tensor, rank: usize, size: usize) -> Tensor {
    let at = |rank| rows.size()[0] * rank as i64 / size as i64;
    rows.narrow(0, at(rank), at(rank + 1) - at(rank))
}
