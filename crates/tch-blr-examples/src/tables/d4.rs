//! Merging fine-tunes of a logistic regression on USPS, by schemes that know more and more of the curvature.
//!
//! Odd digits against even ones; pixels from -1…1 to 0…1, with a 1 in front (257 weights w);
//! ℓ = Σ softplus(xᵀw) - y xᵀw. The base θ₀ is fitted to the digits 0-3 under the penalty ½δ‖w‖², δ = 25, and H₀ is its
//! Hessian with δ. The tasks {4,5}, {6,7}, {8,9} are fine-tuned separately, each with the prior N(θ₀, H₀⁻¹); the target
//! is the fine-tune on all three. Everything is the exact optimum, by Newton's method in f64.

use super::{Figure, Job, Section};
use crate::logistic::{Examples, Logistic, Objective};
use crate::usps::Usps;
use crate::{Outcome, data};
use std::collections::BTreeMap;
use std::path::Path;
use tch::Tensor;
use tch_blr::FullGaussian;
use tch_blr::merge::{Method, Model, Tensors, gradient_matching, merge};

/// Penalty of every weight, the constant's too.
const DELTA: f64 = 25.0;
/// Weights: a constant and 256 pixels.
const FEATURES: i64 = 257;
const TASKS: [[u8; 2]; 3] = [[4, 5], [6, 7], [8, 9]];

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Row {
    /// How it was merged.
    pub scheme: String,
    /// Of all ten digits of the test set, in %.
    pub accuracy: f64,
    /// ‖w - w*‖/‖w*‖ with the target w*.
    pub distance: f64,
    /// Joint loss beyond the target's, in nats.
    pub gap: f64,
}

fn named(w: &Tensor) -> Tensors {
    BTreeMap::from([("w".to_owned(), w.shallow_clone())])
}

/// The table, from a folder that has `usps/`.
pub fn run(data: &Path) -> Outcome<Vec<Row>> {
    let (train, test) = (Usps::load(data, "train")?, Usps::load(data, "test")?);
    let parity = |u: &Usps| Examples { x: u.features(), y: u.odd() };
    let (first, joint, test) = (parity(&train.of(&[0, 1, 2, 3])), parity(&train.of(&TASKS.concat())), parity(&test));
    let model = Logistic::new(FEATURES);
    model.fit(&Objective::new().decay(&model, DELTA)?.loss(&first)?)?;
    let (base, prior) = (model.weights(), model.full_laplace(&first.x, &model.isotropic(DELTA)?)?);
    let fine_tune = |task: &Examples| -> Outcome<FullGaussian> {
        model.set(&base);
        model.fit(&Objective::new().after(&prior).loss(task)?)?;
        model.full_laplace(&task.x, &prior)
    };
    let posteriors = TASKS.iter().map(|digits| fine_tune(&parity(&train.of(digits)))).collect::<Outcome<Vec<_>>>()?;
    let target = fine_tune(&joint)?.mean_vector();

    let diagonal = |precision: &Tensor| named(&precision.diagonal(0, 0, 1).copy());
    let (weights, base_weights): (Vec<Tensors>, _) =
        (posteriors.iter().map(|q| named(&q.mean_vector())).collect(), named(&base));
    let curvature: Vec<Tensors> =
        posteriors.iter().map(|q| diagonal(&(q.precision_matrix() - prior.precision_matrix()))).collect();
    let base_curvature = diagonal(prior.precision_matrix());
    let names = ["4, 5", "6, 7", "8, 9"];
    let models: Vec<Model> =
        names.iter().zip(&weights).zip(&curvature).map(|((n, w), h)| Model::new(n, w).curvature(h)).collect();
    let base_model = Model::new("0-3", &base_weights).curvature(&base_curvature);
    let by = |method| -> Outcome<Tensor> { Ok(merge(method, Some(&base_model), &models)?["w"].copy()) };
    let full = gradient_matching(&prior, &posteriors.iter().map(|q| (1.0, q)).collect::<Vec<_>>())?;

    let mut schemes: Vec<(String, Tensor)> =
        names.iter().zip(&posteriors).map(|(name, q)| (format!("fine-tune on {name}"), q.mean_vector())).collect();
    schemes.extend([
        ("average".to_owned(), by(Method::linear())?),
        ("task arithmetic".to_owned(), by(Method::task_arithmetic(1.0))?),
        ("Fisher average".to_owned(), by(Method::Fisher)?),
        ("gradient matching, diagonal".to_owned(), by(Method::GradientMatching { delta: 0.0, clamp: false })?),
        ("gradient matching, full".to_owned(), full.mean_vector()),
        ("target".to_owned(), target.copy()),
    ]);
    let all = Objective::new().after(&prior).loss(&joint)?;
    let objective = |w: &Tensor| {
        model.set(w);
        all.value(&model)
    };
    let (best, size) = (objective(&target)?, target.norm().double_value(&[]));
    let row = |(scheme, w): (String, Tensor)| {
        let gap = objective(&w)? - best;
        let distance = (&w - &target).norm().double_value(&[]) / size;
        Ok(Row { scheme, accuracy: 100.0 * model.accuracy(&test), distance, gap })
    };
    schemes.into_iter().map(row).collect()
}

/// The table beside the reference.
///
/// # Errors
/// If the data are not there, or an optimum is not found.
pub fn table(_: &Job) -> Outcome<Section> {
    let data = data::folder_with("usps")?;
    let published = [
        ("fine-tune on 4, 5", [81.12, f64::NAN, f64::NAN]),
        ("fine-tune on 6, 7", [86.05, f64::NAN, f64::NAN]),
        ("fine-tune on 8, 9", [87.39, f64::NAN, f64::NAN]),
        ("average", [89.39, 0.562, 476.0]),
        ("task arithmetic", [92.03, 0.292, 170.0]),
        ("Fisher average", [91.08, 0.501, 332.0]),
        ("gradient matching, diagonal", [91.98, 0.336, 153.0]),
        ("gradient matching, full", [93.17, 0.131, 19.3]),
        ("target", [93.32, 0.0, 0.0]),
    ];
    let (mut rows, mut figures) = (Vec::new(), Vec::new());
    for Row { scheme, accuracy, distance, gap } in run(&data)? {
        let reference = published.iter().find(|(name, _)| *name == scheme).map(|(_, values)| values);
        let mut cells = vec![scheme.clone()];
        for (i, (what, ours, digits)) in
            [("accuracy", accuracy, 2), ("distance", distance, 3), ("gap", gap, 1)].into_iter().enumerate()
        {
            let published = reference.map(|values| values[i]).filter(|v| v.is_finite());
            let beside = published.map(|v| format!(" ({v})")).unwrap_or_default();
            cells.push(format!("{ours:.digits$}{beside}"));
            let row = format!("{scheme}: {what}");
            figures.push(Figure { row, published, ours, sd: None, seeds: 1, seconds: None });
        }
        rows.push(cells);
    }
    Ok(Section {
        title: "Merging on USPS".to_owned(),
        text: "Logistic regression, odd against even digits: three fine-tunes of one base, merged, against the \
               fine-tune on all three. Everything is an exact optimum in f64; in brackets the reference values, \
               computed by an independent program. Distance: relative, to the target's weights; gap: joint loss beyond \
               the target's."
            .to_owned(),
        header: ["scheme", "accuracy (%)", "distance", "gap (nats)"].map(str::to_owned).into(),
        rows,
        figures,
    })
}
