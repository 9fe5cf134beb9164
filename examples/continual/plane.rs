//! FROMP's toy problem: decision boundaries, and the examples that hold them.

use crate::page::Page;
use serde_json::json;
use std::path::Path;
use tch::{Kind, Tensor};
use tch_blr_examples::Outcome;
use tch_blr_examples::pictures::planes::{Panel, planes};
use tch_blr_examples::pictures::{Plane, entropy_planes};
use tch_blr_examples::tasks::{Choice, Form, Method, Network, Task, Training, blobs, learn};

type Corners = ((f64, f64), (f64, f64));

const EXTENT: Corners = ((-0.4, 2.7), (-0.7, 1.2));

pub fn run(folder: &Path, quick: bool, page: &mut Page) -> Outcome<()> {
    let (each, epochs) = if quick { (1000, 60) } else { (2000, 50) };
    let tasks = blobs(each, 0);
    let training = Training { epochs, batch: 20, lr: 1e-2, clip: None, decay: false };
    let fromp =
        Method::Fromp { form: Form::Full, choice: Choice::Memorable, memory: 20, tau: 1.0, delta: 1e-4, jitter: 1e-2 };
    let methods = [
        ("naive", Method::Naive),
        ("online Laplace", Method::OnlineLaplace { delta: 1e-4, lambda: 1.0 }),
        ("FROMP", fromp),
    ];
    page.heading("Five tasks along the plane");
    page.text(
        "Ten blobs from left to right, task k is blob k (class 0) against blob k + 5 (class 1); one head, so that one \
         boundary has to serve all tasks. Mean accuracy on all five tasks at the end:",
    );
    let (mut finals, mut rows): (Vec<Plane>, Vec<Vec<String>>) = (Vec::new(), Vec::new());
    for (name, method) in methods {
        tch::manual_seed(2);
        let net = Network::for_blobs();
        // The boundary after each task, and the memory until then.
        let (mut heights, mut memory) = (Vec::new(), Vec::new());
        let learned = learn(name, &net, &tasks, method, training, 2, |t, learned| {
            if let Some(positions) = learned.memories.get(t) {
                memory.extend(points(&tasks[t], positions).into_iter().map(|(x, y, _)| (x, y)));
            }
            heights.push((grid(&net), memory.clone()));
        })?;
        let r = &learned.accuracies;
        rows.push(vec![name.to_owned(), percent(r.average()?), percent(r.learning_accuracy()?)]);
        page.number(&format!("plane, {name}"), json!({"average": r.average()?, "accuracies": r}));
        let (p, _) = heights.last().ok_or("no task")?;
        let entropy = |p: &f64| [*p, 1.0 - p].iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
        finals.push((name.to_owned(), p.iter().map(entropy).collect(), N, N));
        if matches!(method, Method::Fromp { .. }) {
            boundaries(&folder.join("boundaries.svg"), &heights)?;
        }
    }
    page.table(&["method", "average accuracy (%)", "learning accuracy (%)"], &rows);
    let some: Vec<i64> = (0..40).map(|i| i * 2 * each as i64 / 40).collect();
    let shown: Vec<_> = tasks.iter().flat_map(|task| points(task, &some)).collect();
    entropy_planes(&folder.join("plane.svg"), &finals, EXTENT, &shown)?;
    page.picture("plane.svg", "Predictive entropy after the fifth task, with some of all tasks' points");
    page.picture("boundaries.svg", "FROMP: p = 0.1, 0.5, 0.9 after each task, with the memory so far");
    Ok(())
}

const N: usize = 80;

/// p(class 0) on the grid, and the memory.
type State = (Vec<f64>, Vec<(f64, f64)>);

/// p(class 0) at the centres of the cells, row by row.
fn grid(net: &Network) -> Vec<f64> {
    let ((x0, x1), (y0, y1)) = EXTENT;
    let at = |k: usize, a: f64, b: f64| a + (b - a) * (k as f64 + 0.5) / N as f64;
    let points: Vec<f32> = (0..N * N).flat_map(|k| [at(k % N, x0, x1) as f32, at(k / N, y0, y1) as f32]).collect();
    let x = Tensor::from_slice(&points).view([-1, 2]);
    let p = tch::no_grad(|| net.logits(&x).softmax(1, Kind::Double).select(1, 0).contiguous());
    Vec::try_from(p).expect("[N²]")
}

/// (x, y, class) of some of a task's examples.
fn points(task: &Task, positions: &[i64]) -> Vec<(f64, f64, usize)> {
    let (x, y) = &task.train;
    positions
        .iter()
        .map(|&i| (x.double_value(&[i, 0]), x.double_value(&[i, 1]), y.int64_value(&[i]) as usize))
        .collect()
}

fn boundaries(path: &Path, heights: &[State]) -> Outcome<()> {
    let ((x0, x1), (y0, y1)) = EXTENT;
    let cell = |x: f64, a: f64, b: f64| (((x - a) / (b - a) * N as f64) as usize).min(N - 1);
    let surface = |(p, _): &State| {
        let p = p.clone();
        move |x: f64, y: f64| p[cell(y, y0, y1) * N + cell(x, x0, x1)]
    };
    let surfaces: Vec<_> = heights.iter().map(surface).collect();
    let mut panels = Vec::new();
    for (t, (surface, (_, memory))) in surfaces.iter().zip(heights).enumerate() {
        panels.push(Panel {
            title: format!("after task {}", t + 1),
            axes: ("x₁", if t == 0 { "x₂" } else { "" }),
            extent: EXTENT,
            contours: Some((surface, vec![0.1, 0.5, 0.9])),
            arrows: Vec::new(),
            paths: Vec::new(),
            rings: Vec::new(),
            points: memory.clone(),
        });
    }
    planes(path, &panels)
}

fn percent(x: f64) -> String {
    format!("{:.1}", 100.0 * x)
}
