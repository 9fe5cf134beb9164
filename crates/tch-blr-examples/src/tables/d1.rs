//! Four moons, one task after the other: what each way of remembering leaves of the joint objective.
//!
//! Binary logistic regression on all monomials of degree ≤ 5 (21 weights), penalty ½δ‖w‖² with δ = 0.01, each task to
//! its exact optimum in f64.

use super::{Figure, Job, Section};
use crate::four_moons::{FEATURES, tasks};
use crate::logistic::{Examples, Logistic, Objective};
use crate::{Outcome, data};
use std::path::Path;
use tch_blr::selection;

const DELTA: f64 = 0.01;
/// Examples kept of each task.
const MEMORY: usize = 14;

/// What stands for the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Nothing but the penalty.
    Naive,
    /// A quadratic around the previous weights.
    L2,
    /// Online Laplace with a diagonal precision.
    Diagonal,
    /// Online Laplace with the whole precision.
    Full,
    /// The memory with its labels.
    Replay,
    /// The memory with soft labels, and a quadratic around the previous weights.
    KPrior,
    /// The same, and the curvature of the examples that are not in memory.
    LeftOut,
    /// The K-prior with all examples as memory.
    AllData,
}

/// A method, what it is called, and the reference: joint objective and accuracies of the tasks (an independent
/// computation of the same optima).
pub const METHODS: [(Method, &str, f64, [f64; 4]); 8] = [
    (Method::Naive, "none: ½δ‖w‖²", 5297.80, [0.500, 0.500, 0.574, 1.0]),
    (Method::L2, "L2 to the previous weights", 18177.5, [0.500, 0.660, 0.888, 1.0]),
    (Method::Diagonal, "online Laplace, diagonal", 2502.21, [0.532, 0.970, 0.998, 1.0]),
    (Method::Full, "online Laplace, full", 24.085, [1.0, 0.994, 0.998, 1.0]),
    (Method::Replay, "replay of the top-λ 14", 35.462, [1.0, 0.998, 0.996, 1.0]),
    (Method::KPrior, "K-prior, top-λ 14", 22.059, [0.998, 0.996, 0.998, 1.0]),
    (Method::LeftOut, "K-prior, top-λ 14, and the curvature of the rest", 18.957, [1.0, 0.996, 0.998, 1.0]),
    (Method::AllData, "K-prior, all data", 15.9607, [1.0, 1.0, 0.998, 1.0]),
];

/// Objective of the joint optimum, its loss and its penalty.
pub const JOINT: [f64; 3] = [15.960_659, 8.222_779, 7.737_880];

/// What a method leaves.
#[derive(Debug)]
pub struct Run {
    /// Joint objective at the last weights.
    pub objective: f64,
    /// Of the four tasks.
    pub accuracies: Vec<f64>,
    /// ‖w - w_joint‖
    pub distance: f64,
}

/// The tasks, and the optimum of all at once.
#[derive(Debug)]
pub struct FourMoons {
    tasks: Vec<Examples>,
    joint: Objective,
    best: Logistic,
    /// Objective, loss, penalty.
    pub optimum: [f64; 3],
}

impl FourMoons {
    /// # Errors
    /// If the data cannot be read.
    pub fn load(data: &Path) -> Outcome<FourMoons> {
        let tasks = tasks(data)?;
        let best = Logistic::new(FEATURES);
        let all = Examples::join(&tasks.iter().collect::<Vec<_>>());
        let joint = Objective::new().decay(&best, DELTA)?.loss(&all)?;
        let objective = best.fit(&joint)?;
        let loss = Objective::new().loss(&all)?.value(&best)?;
        Ok(FourMoons { tasks, joint, best, optimum: [objective, loss, objective - loss] })
    }

    /// # Errors
    /// If an optimum is not found.
    pub fn run(&self, method: Method) -> Outcome<Run> {
        let model = Logistic::new(FEATURES);
        let mut kept: Vec<Examples> = Vec::new();
        let mut full = model.isotropic(DELTA)?;
        let mut diagonal = None;
        for (t, task) in self.tasks.iter().enumerate() {
            let new = Objective::new().loss(task)?;
            let soft = |mut all: Objective| -> Outcome<Objective> {
                for memory in &kept {
                    all = all.soft(memory, 1.0, &model)?;
                }
                Ok(all)
            };
            let objective = match (method, &diagonal) {
                (Method::Naive, _) => new.decay(&model, DELTA)?,
                (Method::L2, _) => new.after(&model.isotropic(DELTA)?),
                (Method::Diagonal, Some(q)) => new.after_diagonal(q),
                (Method::Diagonal, None) | (Method::Full, _) => new.after(&full),
                (Method::Replay, _) => {
                    let mut all = new.decay(&model, DELTA)?;
                    for memory in &kept {
                        all = all.loss(memory)?;
                    }
                    all
                }
                (Method::KPrior | Method::AllData, _) => soft(new.after(&model.isotropic(DELTA)?))?,
                // Around the newest weights, as the soft labels.
                (Method::LeftOut, _) => soft(new.after(&around(&model, &full)?))?,
            };
            model.fit(&objective)?;
            if t + 1 == self.tasks.len() {
                break;
            }
            // What is left of the task when the next one comes.
            match method {
                Method::Diagonal => {
                    diagonal = Some(match &diagonal {
                        Some(q) => model.laplace(&task.x, q)?,
                        None => model.laplace(&task.x, tch_blr::Prior::isotropic(DELTA))?,
                    });
                }
                Method::Full => full = model.full_laplace(&task.x, &full)?,
                Method::Replay | Method::KPrior | Method::LeftOut => {
                    let scores = task.memory().lambda(|x| model.forward(x))?;
                    let (memory, rest) = task.split(&selection::top(&scores, MEMORY)?);
                    kept.push(memory);
                    if method == Method::LeftOut {
                        full = model.full_laplace(&rest.x, &full)?;
                    }
                }
                Method::AllData => kept.push(Examples::join(&[task])),
                Method::Naive | Method::L2 => (),
            }
        }
        Ok(Run {
            objective: self.joint.value(&model)?,
            accuracies: self.tasks.iter().map(|task| model.accuracy(task)).collect(),
            distance: (model.weights() - self.best.weights()).norm().double_value(&[]),
        })
    }
}

/// The same precision around the present weights.
fn around(model: &Logistic, q: &tch_blr::FullGaussian) -> Outcome<tch_blr::FullGaussian> {
    let names: Vec<&str> = q.names().collect();
    Ok(tch_blr::FullGaussian::new([(names[0], model.weights().unsqueeze(0))], q.precision_matrix())?)
}

/// The table beside the reference.
///
/// # Errors
/// If the data are not there, or an optimum is not found.
pub fn table(_: &Job) -> Outcome<Section> {
    let data = data::folder_with("four_moons")?;
    let moons = FourMoons::load(&data)?;
    let [objective, loss, penalty] = moons.optimum;
    let (mut rows, mut figures) = (Vec::new(), Vec::new());
    let figure = |row: String, published, ours| Figure {
        row,
        published: Some(published),
        ours,
        sd: None,
        seeds: 1,
        seconds: None,
    };
    for (what, (published, ours)) in ["objective", "loss", "penalty"].iter().zip(JOINT.into_iter().zip(moons.optimum)) {
        figures.push(figure(format!("joint: {what}"), published, ours));
    }
    for (method, name, published, accuracies) in METHODS {
        let run = moons.run(method)?;
        let mut cells = vec![name.to_owned(), format!("{:.4}", run.objective), format!("{published}")];
        cells.extend(run.accuracies.iter().map(|a| format!("{a:.3}")));
        cells.push(format!("{:.4}", run.accuracies.iter().sum::<f64>() / 4.0));
        rows.push(cells);
        figures.push(figure(format!("{name}: joint objective"), published, run.objective));
        if method == Method::AllData {
            figures.push(figure(format!("{name}: distance to the joint optimum"), 0.0, run.distance));
        }
        for (t, (ours, published)) in run.accuracies.into_iter().zip(accuracies).enumerate() {
            figures.push(figure(format!("{name}: accuracy {}", t + 1), published, ours));
        }
    }
    let header = ["the past", "joint objective", "reference", "task 1", "task 2", "task 3", "task 4", "mean accuracy"];
    Ok(Section {
        title: "Four moons, four tasks in sequence".to_owned(),
        text: format!(
            "Logistic regression on the 21 monomials of degree ≤ 5, δ = 0.01, every task to its exact optimum in f64 \
             (Newton). The joint optimum is {objective:.6} = {loss:.6} + {penalty:.6}; the K-prior on all data is \
             there. A diagonal precision forgets what a full one keeps; 14 examples per task with soft labels do \
             better than both, and the curvature of the others adds what they miss."
        ),
        header: header.map(str::to_owned).into(),
        rows,
        figures,
    })
}
