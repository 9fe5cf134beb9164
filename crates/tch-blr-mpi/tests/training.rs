//! Optimizers whose ranks are processes: what happens to them changes nothing but time, or ends all of them, and the
//! last checkpoint is whole.

mod job;

use job::Job;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use tch_blr_examples::random::Rng;

/// What the ranks of a job print at the end: the same of all.
fn bits(job: &Job, ranks: usize) -> String {
    job.passes(ranks);
    let mut bits: Vec<&str> = job.stdout.split("bits ").skip(1).map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(bits.len(), ranks, "{}", job.stdout);
    bits.dedup();
    assert_eq!(bits.len(), 1, "ranks differ: {}", job.stdout);
    bits[0].to_owned()
}

fn train(ranks: usize, variables: &[(&str, &str)]) -> Job {
    Job::of(ranks, "trains", variables)
}

fn file(folder: &tempfile::TempDir, name: &str) -> (PathBuf, String) {
    let path = folder.path().join(name);
    let text = path.display().to_string();
    (path, text)
}

#[test]
fn what_goes_wrong_between_ranks_changes_nothing_but_time() {
    let folder = tempfile::tempdir().unwrap();
    let [(_, a), (_, b), (_, c)] = ["a", "b", "c"].map(|name| file(&folder, name));
    let expected = bits(&train(3, &[("CHECKPOINT", &a), ("STEPS", "12")]), 3);
    // A rank that is late, and a disk of rank 0 that is slow.
    let slow = train(3, &[("CHECKPOINT", &b), ("STEPS", "12"), ("FAULT", "slow")]);
    assert_eq!(bits(&slow, 3), expected);
    // A rank whose closure returns an error in step 5: none has taken the step, and they go on.
    let failing = train(3, &[("CHECKPOINT", &c), ("STEPS", "12"), ("FAULT", "error")]);
    assert_eq!(bits(&failing, 3), expected);
    assert_eq!(failing.stdout.matches("error of step 5: rank 1: ").count(), 3, "{}", failing.stdout);
}

#[test]
fn two_optimizers_share_the_ranks() {
    Job::of(3, "trains_two", &[]).passes(3);
}

#[test]
fn a_panic_of_one_closure_ends_the_job() {
    let folder = tempfile::tempdir().unwrap();
    let (path, text) = file(&folder, "checkpoint");
    let job = train(4, &[("CHECKPOINT", &text), ("STEPS", "12"), ("FAULT", "panic")]);
    job.fails(None, &["a panic of its own", "rank 1 of 4 has panicked"]);
    // Of step 3.
    assert_eq!(child::steps(&path), 3);
}

/// What `step_chunks` does in one process: to the bit with two ranks, whose sum has one order; with four, whose sum MPI
/// orders as it likes, to two units in the last place of the largest weight of each parameter.
#[test]
fn ranks_are_chunks() {
    for ranks in [1, 2, 4] {
        Job::of(ranks, "equals_chunks", &[]).passes(ranks);
    }
}

#[test]
fn a_checkpoint_goes_on_with_fewer_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let [(through, a), (path, b)] = ["a", "b"].map(|name| file(&folder, name));
    let expected = bits(&train(4, &[("CHECKPOINT", &a), ("STEPS", "12")]), 4);
    // As many: the same bits as without a stop.
    bits(&train(4, &[("CHECKPOINT", &b), ("STEPS", "6")]), 4);
    assert_eq!(bits(&train(4, &[("CHECKPOINT", &b), ("STEPS", "12")]), 4), expected);
    assert_eq!(std::fs::read(through).unwrap(), std::fs::read(&path).unwrap());
    for (ranks, steps) in [(2, 15), (1, 18), (3, 21)] {
        bits(&train(ranks, &[("CHECKPOINT", &b), ("STEPS", &steps.to_string())]), ranks);
        assert_eq!(child::steps(&path), steps);
    }
}

/// Kills one process each time, at random moments; the next job goes on with the file that is left.
fn kill_at_random(rounds: usize) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = std::env::var("SEED").map_or(now.as_secs(), |seed| seed.parse().expect("SEED: a whole number"));
    println!("SEED={seed} does the same again");
    let mut random = Rng::new(seed, 0);
    let folder = tempfile::tempdir().unwrap();
    let (path, text) = file(&folder, "checkpoint");
    let (mut steps, mut longest) = (0, Duration::ZERO);
    for round in 0..rounds {
        let ranks = [4, 2, 3, 1][round % 4];
        let (rank, delay) = (random.below(ranks), random.below(400));
        let begin = Instant::now();
        // As many steps as it takes.
        let job = train(
            ranks,
            &[
                ("CHECKPOINT", text.as_str()),
                ("STEPS", "1000000000"),
                ("KILL_RANK", &rank.to_string()),
                ("KILL_AFTER", &delay.to_string()),
            ],
        );
        longest = longest.max(begin.elapsed());
        job.fails(Some(128 + 9), &["signal 9"]);
        assert!(!job.stdout.contains("bits"), "a rank has come to the end: {}", job.stdout);
        nobody_is_left(&text);
        // Whole, and never of an earlier step than the one before.
        let now = if path.exists() { child::steps(&path) } else { 0 };
        assert!(now >= steps, "{now} steps after {steps}");
        println!("{round}: rank {rank} of {ranks} killed after {delay} ms; {now} steps are saved");
        steps = now;
    }
    println!("{rounds} kills, {steps} steps, the longest job took {} s", longest.as_secs());
    assert!(steps > 0, "no job has come to a checkpoint");
    bits(&train(2, &[("CHECKPOINT", &text), ("STEPS", &(steps + 3).to_string())]), 2);
}

/// No process has this in its environment; those that the kernel is still at may take a moment.
fn nobody_is_left(text: &str) {
    let left = || {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        processes.filter(|p| std::fs::read(p.path().join("environ")).is_ok_and(|e| has(&e, text))).count()
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while left() > 0 {
        assert!(Instant::now() < deadline, "{} processes are left behind", left());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn has(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|part| part == text.as_bytes())
}

#[test]
fn a_few_kills() {
    kill_at_random(3);
}

#[test]
#[ignore = "minutes: `make test-faults`"]
fn fifty_kills() {
    kill_at_random(50);
}

mod child {
    use super::{Duration, Path, PathBuf};
    use std::hash::{DefaultHasher, Hash, Hasher};
    use tch::{Reduction, Tensor};
    use tch_blr::parallel::{Alone, Collective};
    use tch_blr::rule::Row;
    use tch_blr::{Adam, BayesianSam, Builder, Ivon, Optimizer, Philox, Sgd, Von};
    use tch_blr_examples::handwritten::{self, Examples};
    use tch_blr_examples::model::Mlp;
    use tch_blr_mpi::Mpi;

    const BATCH: i64 = 30;

    fn fresh(collective: impl Collective + 'static) -> (Mlp, Optimizer<Ivon>) {
        tch::manual_seed(collective.rank() as i64);
        let net = Mlp::new(&[64, 32, 10]);
        let builder = Ivon::default().ess(400.0).builder().noise(Philox { seed: 3 }).parallel(collective);
        let opt = builder.build(&net.vs, 0.1).unwrap();
        (net, opt)
    }

    /// Of a checkpoint, in this one process.
    pub fn steps(checkpoint: &Path) -> u64 {
        let (_net, mut opt) = fresh(Alone);
        opt.load(checkpoint).unwrap();
        opt.steps()
    }

    /// The part of a rank of the batch of a step.
    fn part(data: &Examples, step: u64, rank: usize, size: usize) -> Examples {
        let begin = step as i64 % 10 * BATCH;
        let at = |rank: usize| begin + BATCH * rank as i64 / size as i64;
        let of = |all: &Tensor| all.narrow(0, at(rank), at(rank + 1) - at(rank));
        Examples { images: of(&data.images), labels: of(&data.labels) }
    }

    fn variable(name: &str) -> Option<u64> {
        std::env::var(name).ok().map(|value| value.parse().unwrap())
    }

    fn sleep(milliseconds: u64) {
        std::thread::sleep(Duration::from_millis(milliseconds));
    }

    fn compare<R: Row>(mpi: &Mpi, data: &Examples, builder: impl Fn() -> Builder<R>) {
        let (rank, size) = (mpi.rank(), mpi.size());
        let build = |collective: Box<dyn Collective>| {
            tch::manual_seed(7);
            let net = Mlp::new(&[64, 32, 10]);
            let opt = builder().noise(Philox { seed: 3 }).parallel(collective).build(&net.vs, 0.01).unwrap();
            (net, opt)
        };
        let (ours, mut together) = build(Box::new(mpi.clone()));
        let (theirs, mut alone) = build(Box::new(Alone));
        // Uneven parts, so that weights count.
        let losses = |net: &Mlp, of: &Examples| {
            net.logits(&of.images).cross_entropy_loss::<Tensor>(&of.labels, None, Reduction::None, -100, 0.0)
        };
        let steps = if size <= 2 { 4 } else { 1 };
        for step in 0..steps {
            let ours = together.step(|| losses(&ours, &part(data, step, rank, size))).unwrap();
            let theirs = alone.step_chunks(size, |k| losses(&theirs, &part(data, step, k, size))).unwrap();
            assert!((ours - theirs).abs() <= if size <= 2 { 0.0 } else { 1e-12 }, "{ours} {theirs}");
        }
        for (a, b) in ours.vs.trainable_variables().iter().zip(theirs.vs.trainable_variables()) {
            if size <= 2 {
                assert!(a.equal(&b), "{} on {size} ranks", R::NAME);
            }
            let number = |t: Tensor| t.abs().max().double_value(&[]);
            let units = number(a - &b) / number(a.shallow_clone()) / f64::from(f32::EPSILON);
            assert!(units <= 2.0, "{} on {size} ranks: {units} units", R::NAME);
        }
    }

    #[test]
    #[ignore = "run by mpirun"]
    fn equals_chunks() {
        let (data, mpi) = (handwritten::all().unwrap(), Mpi::new().unwrap());
        compare(&mpi, &data, || Sgd::default().momentum(0.9).builder());
        compare(&mpi, &data, || Adam::default().builder());
        compare(&mpi, &data, || Ivon::default().ess(400.0).builder());
        compare(&mpi, &data, || Von::vogn().ess(400.0).builder());
        compare(&mpi, &data, || BayesianSam::default().ess(400.0).builder());
    }

    /// Two models by turns, as in a game: each does what it does alone.
    #[test]
    #[ignore = "run by mpirun"]
    fn trains_two() {
        let data = handwritten::all().unwrap();
        let mpi = Mpi::new().unwrap();
        let (rank, size) = (mpi.rank(), mpi.size());
        let mut models = [(); 3].map(|()| fresh(mpi.clone()));
        let mut step = |model: usize, at: u64| {
            let (part, (net, opt)) = (part(&data, at, rank, size), &mut models[model]);
            opt.step(|| net.logits(&part.images).cross_entropy_for_logits(&part.labels)).unwrap()
        };
        let alone: Vec<f64> = (0..5).map(|at| step(0, at)).collect();
        for at in 0..5 {
            assert_eq!(step(1, at), alone[at as usize]);
            assert_eq!(step(2, at), alone[at as usize]);
        }
    }

    /// Goes on from the checkpoint, if there is one, and saves every third step.
    #[test]
    #[ignore = "run by mpirun"]
    fn trains() {
        let checkpoint = PathBuf::from(std::env::var_os("CHECKPOINT").unwrap());
        let fault = std::env::var("FAULT").unwrap_or_default();
        let data = handwritten::all().unwrap();
        let mpi = Mpi::new().unwrap();
        let (rank, size) = (mpi.rank(), mpi.size());
        let (net, mut opt) = fresh(mpi);
        if checkpoint.exists() {
            opt.load(&checkpoint).unwrap();
        }
        if variable("KILL_RANK") == Some(rank as u64) {
            std::thread::spawn(|| {
                sleep(variable("KILL_AFTER").unwrap());
                let own = std::process::id().to_string();
                std::process::Command::new("kill").args(["-KILL", &own]).status().unwrap();
            });
        }
        let mut fails = fault == "error";
        while opt.steps() < variable("STEPS").unwrap() {
            let step = opt.steps();
            let part = part(&data, step, rank, size);
            if fault == "slow" && rank == size - 1 {
                sleep(20 * (step % 3));
            }
            let result = opt.step(|| {
                if rank == 1 && step == 5 {
                    assert!(fault != "panic", "a panic of its own");
                    if fails {
                        return Err("an error of its own");
                    }
                }
                let y = &part.labels;
                Ok(net.logits(&part.images).cross_entropy_loss::<Tensor>(y, None, Reduction::None, -100, 0.0))
            });
            if let Err(e) = result {
                assert!(std::mem::take(&mut fails), "{e}");
                println!("error of step {step}: {e}");
                assert_eq!(opt.steps(), step);
                continue;
            }
            if opt.steps().is_multiple_of(3) {
                if fault == "slow" && rank == 0 {
                    sleep(50);
                }
                opt.save(&checkpoint).unwrap();
            }
        }
        let mut variables: Vec<_> = net.vs.variables().into_iter().collect();
        variables.sort_by(|a, b| a.0.cmp(&b.0));
        let mut hasher = DefaultHasher::new();
        for (_, values) in &variables {
            let values = Vec::<f32>::try_from(values.flatten(0, -1)).unwrap();
            for x in values {
                x.to_bits().hash(&mut hasher);
            }
        }
        println!("bits {:x} of rank {rank}", hasher.finish());
    }
}
