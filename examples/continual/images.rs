//! Permuted digits: every method, every metric, and which examples are worth keeping.

use crate::page::Page;
use serde_json::json;
use std::path::Path;
use tch::Tensor;
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::pictures::{Curves, training_curves};
use tch_blr_examples::sheets::{heat_maps, images};
use tch_blr_examples::tasks::{Choice, Form, Learned, Method, Network, Task, Training, learn, permuted_digits};

const fn fromp(form: Form, choice: Choice, memory: usize) -> Method {
    Method::Fromp { form, choice, memory, tau: 0.5, delta: 1e-5, jitter: 1e-5 }
}

fn run_one(what: &str, tasks: &[Task], method: Method, epochs: u64) -> Outcome<Learned> {
    tch::manual_seed(0);
    let net = Network::new(&[784, 100, 100, 10], 1, Tensor::relu);
    let clip = matches!(method, Method::Fromp { .. }).then_some(0.01);
    Ok(learn(what, &net, tasks, method, Training { epochs, batch: 128, lr: 1e-3, clip, decay: false }, 0, |_, _| ())?)
}

pub fn run(data: &Digits, folder: &Path, quick: bool, page: &mut Page) -> Outcome<()> {
    let (train, test, count, epochs) = if quick { (3000, 500, 3, 8) } else { (12_000, 2000, 4, 6) };
    let some = |t: &Tensor, n: i64| t.narrow(0, 0, n.min(t.size()[0]));
    let data = Digits {
        train_images: some(&data.train_images, train),
        train_labels: some(&data.train_labels, train),
        test_images: some(&data.test_images, test),
        test_labels: some(&data.test_labels, test),
        source: data.source.clone(),
    };
    let tasks = permuted_digits(&data, count);
    page.heading("Permuted digits");
    page.text(&format!(
        "{}: {train} training and {test} test images, {count} tasks with the pixels in another order in each, one \
         head, network 784-100-100-10, {epochs} epochs a task. Accuracies in percent, transfer and forgetting in \
         points.",
        data.source
    ));
    let methods = [
        ("naive", Method::Naive),
        ("Synaptic Intelligence", Method::SynapticIntelligence { c: 0.1, xi: 0.1 }),
        ("online Laplace", Method::OnlineLaplace { delta: 1e-5, lambda: 1.0 }),
        (
            "IVON, posterior as prior",
            Method::Ivon { gamma: 1.0, hess_init: 0.03, beta2: 0.999, delta: 5e-5, step: 0.03 },
        ),
        ("replay, 100 a task", Method::Replay { memory: 100 }),
        ("FROMP-L2, 100 a task", fromp(Form::Identity, Choice::Memorable, 100)),
        ("FROMP, 100 a task", fromp(Form::Full, Choice::Memorable, 100)),
    ];
    let (mut rows, mut matrices, mut naive) = (Vec::new(), Vec::new(), 0.0);
    for (name, method) in methods {
        let learned = run_one(name, &tasks, method, epochs)?;
        let r = learned.accuracies;
        let numbers =
            [r.average()?, r.backward_transfer()?, r.forward_transfer()?, r.forgetting()?, r.learning_accuracy()?];
        let mut row = vec![name.to_owned()];
        row.extend(numbers.map(|x| format!("{:.1}", 100.0 * x)));
        row.push(format!("{:.1}", learned.seconds_per_task));
        rows.push(row);
        page.number(&format!("permuted, {name}"), json!({"average": numbers[0], "accuracies": r}));
        if matches!(method, Method::Naive) {
            naive = numbers[0];
        }
        matrices.push((name.to_owned(), r));
    }
    let header = ["method", "ACC", "BWT", "FWT", "forgetting", "learning accuracy", "seconds per task"];
    page.table(&header, &rows);
    heat_maps(&folder.join("accuracies.svg"), &matrices)?;
    page.picture("accuracies.svg", "Accuracy on each task (column) after each task (row)");
    sweep(&data, &tasks, folder, epochs, naive, page)
}

/// FROMP with more and less memory, chosen well and badly.
fn sweep(data: &Digits, tasks: &[Task], folder: &Path, epochs: u64, naive: f64, page: &mut Page) -> Outcome<()> {
    let sizes: [usize; 4] = [10, 30, 100, 300];
    let choices =
        [("memorable", Choice::Memorable), ("random", Choice::Random), ("least memorable", Choice::LeastMemorable)];
    let log = |m: usize| (m as f64).log10();
    let ends = [log(sizes[0]), log(sizes[3])];
    let mut series = vec![("naive".to_owned(), ends.map(|x| (x, 100.0 * naive)).to_vec())];
    for (name, choice) in choices {
        let mut curve = Vec::new();
        for m in sizes {
            let learned = run_one(&format!("FROMP, {m} {name}"), tasks, fromp(Form::Full, choice, m), epochs)?;
            let average = learned.accuracies.average()?;
            curve.push((log(m), 100.0 * average));
            page.number(&format!("permuted, FROMP, {m} {name}"), average.into());
            if m == 30 && choice != Choice::Random {
                let (file, of) = (format!("{}.svg", name.replace(' ', "_")), &learned.memories[0]);
                images(&folder.join(&file), &data.train_images.index_select(0, &Tensor::from_slice(of)), 15)?;
                page.picture(&file, &format!("The 30 {name} images of the first task, three per digit"));
            }
        }
        series.push((name.to_owned(), curve));
    }
    let panel = Curves { y_label: "average accuracy (%)".to_owned(), series };
    training_curves(&folder.join("memory.svg"), "log₁₀ of the examples kept per task", &[panel])?;
    page.picture("memory.svg", "FROMP with more and less memory, chosen by tr Λ, at random, and the wrong way round");
    Ok(())
}
