//! A process that is killed while it saves leaves a checkpoint to go on from, every time.
#![cfg(unix)]

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use support::{F64, Snapshot, bits, store, variable, wave_at};
use tch::nn::VarStore;
use tch::{Kind, Tensor};
use tch_blr::{Ivon, Optimizer, Philox};

/// Where the child saves.
const TARGET: &str = "TCH_BLR_TEST_CHECKPOINT";
const ROUNDS: u32 = 24;

/// So many that writing them takes a while.
const WEIGHTS: i64 = 50_000;

struct Problem {
    vs: VarStore,
    w: Tensor,
}

impl Problem {
    fn loss(&self) -> Tensor {
        (&self.w - 0.3).square().mean(Kind::Double)
    }
}

/// `phase` chooses the initial weights.
fn fresh(phase: f64, seed: u64) -> (Problem, Optimizer<Ivon>) {
    let vs = store(F64);
    let w = variable(&vs, "w", 0, &wave_at(&[WEIGHTS], phase, F64));
    let opt = Ivon::default().ess(1e3).beta2(0.99).noise(Philox { seed }).build(&vs, 0.05).unwrap();
    (Problem { vs, w }, opt)
}

/// Trains and saves, mostly the latter, until it is killed.
#[test]
#[ignore = "not a test: the process that killed_while_saving starts"]
fn child() {
    let Some(target) = std::env::var_os(TARGET).map(PathBuf::from) else { return };
    let (problem, mut opt) = fresh(0.0, 5);
    if target.exists() {
        opt.load(&target).unwrap();
    }
    loop {
        opt.step(|| problem.loss()).unwrap();
        for _ in 0..8 {
            opt.save(&target).unwrap();
        }
    }
}

/// The undisturbed run, continued as far as it is asked for.
struct Undisturbed {
    problem: Problem,
    opt: Optimizer<Ivon>,
}

impl Undisturbed {
    fn go_to(&mut self, steps: u64) {
        assert!(self.opt.steps() <= steps, "a kill has undone steps that were saved");
        while self.opt.steps() < steps {
            self.opt.step(|| self.problem.loss()).unwrap();
        }
    }
}

/// Sends it a signal, by name.
fn signal(name: &str, child: &Child) {
    let sent = Command::new("sh").arg("-c").arg(format!("kill -{name} {}", child.id())).status().unwrap();
    assert!(sent.success(), "{name}: {sent}");
}

/// A child that stands still shows whether it is within a save.
fn stop_within_a_save(child: &Child, saving: impl Fn() -> bool) {
    let started = Instant::now();
    for attempt in 0u64.. {
        signal("STOP", child);
        // Until its threads have left the system call that they are in.
        sleep(Duration::from_millis(5));
        if saving() {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "the child is never within a save");
        signal("CONT", child);
        // Also long enough to be run at all on a machine with other work.
        sleep(Duration::from_micros(300 + attempt % 16 * 2_000));
    }
}

fn drafts(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().filter(|f| f.as_ref().unwrap().path().extension().is_some_and(|e| e == "tmp")).count()
}

#[test]
fn killed_while_saving() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("run.safetensors");
    let (problem, opt) = fresh(0.0, 5);
    let mut undisturbed = Undisturbed { problem, opt };
    let mut interrupted_saves = 0;
    let mut last = 0;
    // Weights one step after the last checkpoint, to be compared when the undisturbed run gets there.
    let mut next = None;
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "child", "--nocapture"])
            .env(TARGET, &target)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Wait for a save of this child, which takes as long as a program takes to start; then for a moment more that
        // differs from round to round.
        let stamp = || fs::metadata(&target).and_then(|m| m.modified()).ok();
        let (started, before) = (Instant::now(), stamp());
        while stamp() == before {
            assert!(started.elapsed() < Duration::from_secs(60), "the child does not save");
            if child.try_wait().unwrap().is_some() {
                let mut text = String::new();
                child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
                panic!("round {round}: the child has ended by itself:\n{text}");
            }
            sleep(Duration::from_micros(200));
        }
        sleep(Duration::from_micros(u64::from(round) * 37_741 % 150_000));
        // Every other time, into a save on purpose.
        if round % 2 == 1 {
            stop_within_a_save(&child, || drafts(dir.path()) > 0);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What the rounds before have left, the child's first save has removed.
        let left = drafts(dir.path());
        assert!(left <= 1, "round {round}: {left} drafts");
        interrupted_saves += left as u32;

        // Another model, seed and learning rate: all that matters comes from the file.
        let (problem, mut resumed) = fresh(f64::from(round) + 1.0, 77);
        resumed.load(&target).unwrap_or_else(|e| panic!("round {round}: {e}"));
        assert!(resumed.steps() > last, "round {round}: no progress");
        if let Some(next) = next.take() {
            undisturbed.go_to(last + 1);
            assert!(next == bits(&undisturbed.problem.w), "round {round}: resumed from step {last}");
        }
        last = resumed.steps();
        undisturbed.go_to(last);
        assert!(bits(&problem.w) == bits(&undisturbed.problem.w), "round {round}, step {last}");
        let expected = Snapshot::of(&undisturbed.opt, &undisturbed.problem.vs).values();
        assert!(Snapshot::of(&resumed, &problem.vs).values() == expected, "round {round}, step {last}");
        resumed.step(|| problem.loss()).unwrap();
        next = Some(bits(&problem.w));
    }
    undisturbed.go_to(last + 1);
    assert!(next.is_some_and(|w| w == bits(&undisturbed.problem.w)), "resumed from step {last}");
    println!("{last} steps, {interrupted_saves} of {ROUNDS} kills in the middle of a save");
    assert!(interrupted_saves >= ROUNDS / 2, "every other kill hits a save");
}

/// What a killed process has left beside the checkpoint is neither read nor in the way, and the next save removes it.
#[test]
fn stale_drafts_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("run.safetensors");
    let (problem, mut opt) = fresh(0.0, 5);
    opt.step(|| problem.loss()).unwrap();
    opt.save(&target).unwrap();
    let whole = fs::read(&target).unwrap();
    let stale = dir.path().join(".run.safetensors.blr-00000000075bcd15.tmp");
    let others = dir.path().join(".run.safetensors.tmp");
    for path in [&stale, &others] {
        fs::write(path, &whole[..whole.len() / 2]).unwrap();
    }
    let (other, mut resumed) = fresh(1.0, 6);
    resumed.load(&target).unwrap();
    assert!(Snapshot::of(&opt, &problem.vs).values() == Snapshot::of(&resumed, &other.vs).values());
    resumed.step(|| other.loss()).unwrap();
    resumed.save(&target).unwrap();
    opt.load(&target).unwrap();
    assert_eq!(opt.steps(), 2);
    assert!(!stale.exists());
    // Not ours.
    assert_eq!(fs::read(&others).unwrap(), whole[..whole.len() / 2]);
}
