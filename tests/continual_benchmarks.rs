//! The tables of continual learning (`make reproduce`), reduced: three tasks, few images, few epochs. The bars are
//! those of these reductions, and the same for MNIST and, without `TCH_BLR_DATA`, for drawn digits. Two reductions are
//! reduced once more, to seconds; `make test-statistics` has the larger ones.

use tch::Tensor;
use tch_blr::metrics::AccuracyMatrix;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::tasks::{
    Choice, Form, Method, Network, Task, Training, blobs, learn, permuted_digits, split_digits,
};

const TASKS: usize = 3;

fn data(images: i64) -> Digits {
    let all = support::data_or_drawn("mnist")
        .map_or_else(|| Digits::synthetic(6_000, 1_000, 0), |data| Digits::load_from(Some(&data)).unwrap());
    let some = |t: &Tensor, n: i64| t.narrow(0, 0, n.min(t.size()[0]));
    Digits {
        train_images: some(&all.train_images, images),
        train_labels: some(&all.train_labels, images),
        test_images: some(&all.test_images, 2_000),
        test_labels: some(&all.test_labels, 2_000),
        source: all.source,
    }
}

/// In the order of the methods.
fn averages(tasks: &[Task], net: fn() -> Network, methods: &[(&str, Method, Training)]) -> Vec<f64> {
    let run = |(name, method, training): &(&str, Method, Training)| {
        tch::manual_seed(0);
        let r = learn(name, &net(), tasks, *method, *training, 0, |_, _| ()).unwrap().accuracies;
        println!("{name}: {} (learning {})", average(&r), r.learning_accuracy().unwrap());
        average(&r)
    };
    methods.iter().map(run).collect()
}

fn average(r: &AccuracyMatrix) -> f64 {
    100.0 * r.average().unwrap()
}

const fn fromp(memory: usize, tau: f64, delta: f64, jitter: f64) -> Method {
    Method::Fromp { form: Form::Full, choice: Choice::Memorable, memory, tau, delta, jitter }
}

const fn adam(epochs: u64, batch: usize, lr: f64, clip: Option<f64>) -> Training {
    Training { epochs, batch, lr, clip, decay: false }
}

#[test]
fn split_digits_with_the_pair_known() {
    let tasks: Vec<Task> = split_digits(&data(6_000), true).into_iter().skip(2).collect();
    let training = adam(5, 64, 1e-3, None);
    let [naive, si, fromp] = averages(
        &tasks,
        || Network::new(&[784, 100, 100, 10], 1, Tensor::relu),
        &[
            ("naive", Method::Naive, training),
            ("SI", Method::SynapticIntelligence { c: 1.0, xi: 1e-3 }, training),
            ("FROMP", fromp(40, 10.0, 1e-3, 1e-6), adam(5, 64, 1e-3, Some(0.1))),
        ],
    )[..] else {
        unreachable!()
    };
    let [ivon] = averages(
        &tasks,
        || Network::new(&[784, 100, 100, 10], 5, Tensor::relu),
        &[(
            "IVON",
            Method::Ivon { gamma: 1.0, hess_init: 0.1, beta2: 0.9995, delta: 1e-4, step: 0.02 },
            adam(10, 64, 0.0, None),
        )],
    )[..] else {
        unreachable!()
    };
    // Drawn digits are easier than MNIST: three tasks of them are hardly forgotten. IVON has 96.2 on MNIST and 95.3 on
    // them; its bar leaves room for what other roundings of the training change in a thousand test images.
    assert!(si > naive && fromp > naive, "{naive} {si} {fromp}");
    assert!(si >= 97.0 && ivon >= 94.0 && fromp >= 98.0, "{si} {ivon} {fromp}");
}

/// Averages of naive training, the two Laplace approximations and FROMP.
fn permuted(tasks: &[Task]) -> [f64; 4] {
    averages(
        tasks,
        || Network::new(&[784, 100, 100, 10], 1, Tensor::relu),
        &[
            ("naive", Method::Naive, adam(4, 128, 1e-3, None)),
            ("Laplace", Method::OnlineLaplace { delta: 1e-5, lambda: 1.0 }, adam(4, 128, 1e-3, None)),
            ("Kronecker", Method::KroneckerLaplace { delta: 1e-5, lambda: 1.0 }, adam(4, 128, 1e-3, None)),
            ("FROMP", fromp(200, 0.5, 1e-5, 1e-5), adam(4, 128, 1e-3, Some(0.01))),
        ],
    )
    .try_into()
    .unwrap()
}

/// What a diagonal leaves out is most of what there is to know; without IVON, which needs more steps than these.
#[test]
fn permuted_digits_with_one_head() {
    let [naive, laplace, kronecker, fromp] = permuted(&permuted_digits(&data(3_000), TASKS as u64));
    assert!(kronecker > naive + 3.0 && kronecker > laplace + 2.0, "{naive} {laplace} {kronecker}");
    assert!(fromp > laplace + 2.0 && fromp >= 83.0, "{laplace} {fromp}");
}

#[test]
#[ignore = "40 s of one core; make test-statistics"]
fn permuted_digits_with_one_head_and_twice_the_images() {
    let tasks = permuted_digits(&data(6_000), TASKS as u64);
    let [naive, laplace, kronecker, fromp] = permuted(&tasks);
    let [ivon] = averages(
        &tasks,
        || Network::new(&[784, 100, 100, 10], 1, Tensor::relu),
        &[(
            "IVON",
            Method::Ivon { gamma: 1.0, hess_init: 0.03, beta2: 0.999, delta: 5e-5, step: 0.01 },
            adam(6, 64, 0.0, None),
        )],
    )[..] else {
        unreachable!()
    };
    assert!(laplace > naive + 1.0 && ivon > naive + 3.0 && fromp > laplace + 2.0, "{naive} {laplace} {ivon} {fromp}");
    assert!(ivon >= 84.0 && fromp >= 88.0, "{ivon} {fromp}");
    assert!(kronecker > laplace + 2.0, "{kronecker} {laplace}");
}

#[test]
fn weights_alone_do_not_keep_classes_apart() {
    let tasks: Vec<Task> = split_digits(&data(6_000), false).into_iter().take(TASKS).collect();
    let training = adam(4, 64, 1e-3, None);
    let [naive, laplace, replay, all_three, fromp] = averages(
        &tasks,
        || Network::new(&[784, 100, 100, 10], 1, Tensor::relu),
        &[
            ("naive", Method::Naive, training),
            ("Laplace", Method::OnlineLaplace { delta: 1e-3, lambda: 1.0 }, training),
            ("replay", Method::Replay { memory: 40 }, training),
            ("EWC + FR + Replay", Method::EwcFrReplay { memory: 40, weight: 30.0, delta: 1e-3, lambda: 1.0 }, training),
            ("FROMP", fromp(40, 10.0, 1e-3, 1e-6), adam(4, 64, 1e-3, Some(0.1))),
        ],
    )[..] else {
        unreachable!()
    };
    // The last of three pairs, and no other.
    assert!(naive < 40.0 && laplace < 40.0, "{naive} {laplace}");
    assert!(replay >= 80.0 && all_three >= 80.0 && fromp >= 60.0, "{replay} {all_three} {fromp}");
}

/// Averages of Laplace's approximation and FROMP on blobs of so many points.
fn along_the_plane(points: usize) -> [f64; 2] {
    let tasks: Vec<Task> = blobs(points, 0).into_iter().take(TASKS).collect();
    let training = adam(40, 20, 1e-2, None);
    averages(
        &tasks,
        Network::for_blobs,
        &[
            ("Laplace", Method::OnlineLaplace { delta: 1e-4, lambda: 1.0 }, training),
            // Ten times the published ε: behind the stiffer penalty so few steps do not learn the third task.
            ("FROMP", fromp(20, 1.0, 1e-4, 1e-2), training),
        ],
    )
    .try_into()
    .unwrap()
}

/// So few steps do not learn the third task to its end.
#[test]
fn blobs_along_the_plane() {
    let [laplace, fromp] = along_the_plane(300);
    assert!(laplace < 80.0 && fromp > laplace + 10.0, "{laplace} {fromp}");
}

#[test]
#[ignore = "20 s of one core; make test-statistics"]
fn blobs_along_the_plane_to_the_end() {
    let [laplace, fromp] = along_the_plane(1000);
    assert!(laplace < 90.0 && fromp >= 98.5, "{laplace} {fromp}");
}
