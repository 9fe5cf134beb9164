//! Averages by curvature and sums of natural parameters, which are one formula: Fisher averaging, gradient matching,
//! combine.

use super::job::{Job, first, update};
use super::{Input, Inputs, Output, Plan};
use crate::number::{BLOCK, Number};
use crate::{Error, Method};
use rayon::prelude::*;

/// Σ w s θ, Σ w s, Σ w θ and, over the negative w alone, Σ |w| s of one element. In f64: with negative weights the sums
/// are differences of large numbers.
type Sums = [f64; 4];

/// Adds a term of weight w and precision s + offset to the sums of every element.
fn add<T: Number>(sums: &mut [Sums], w: f64, x: &[T], s: &[T], offset: impl Fn(usize) -> f64 + Sync) {
    sums.par_chunks_mut(BLOCK).enumerate().for_each(|(block, sums)| {
        for (i, [sx, ss, plain, taken]) in sums.iter_mut().enumerate() {
            let i = block * BLOCK + i;
            let (x, s) = (x[i].wide(), w * (s[i].wide() + offset(i)));
            *sx += s * x;
            *ss += s;
            *plain += w * x;
            *taken += (-s).max(0.0);
        }
    });
}

impl<T: Number, E: From<Error>> Job<'_, T, E> {
    /// θ = Σ w_k s_k θ_k / Σ w_k s_k; gradient matching has the base as one more term, of weight 1 - Σ w_k.
    pub fn natural(&mut self) -> Result<(), E> {
        let plan = self.plan;
        let rest = 1.0 - plan.models.iter().map(|(_, w)| w).sum::<f64>();
        let (delta, clamp) = match plan.method {
            Method::GradientMatching { delta, clamp } => (delta, clamp && plan.posteriors),
            _ => (0.0, false),
        };
        let fisher = plan.method == Method::Fisher;
        let (mut x, mut s, mut base) = (Vec::new(), Vec::new(), Vec::new());
        let mut sums: Vec<Sums> = Vec::new();
        let mut shortage = Shortage { elements: 0, largest: f64::INFINITY };
        for at in self.chunks() {
            sums.clear();
            sums.resize(at.len(), [0.0; 4]);
            // H₀, or zero for the methods without a base.
            base.clear();
            base.resize(at.len(), T::zero());
            if plan.method.needs_base() {
                self.read(Input::Base, at.clone(), &mut x)?;
                self.read_curvature(Input::BaseCurvature, at.clone(), &mut base)?;
                add(&mut sums, rest, &x, &base, |_| delta);
            }
            for (k, (_, w)) in plan.models.iter().enumerate() {
                self.read(Input::Model(k), at.clone(), &mut x)?;
                self.read_curvature(Input::Curvature(k), at.clone(), &mut s)?;
                if clamp {
                    // max(s_k - H₀, 0) + H₀
                    update(&mut s, &base, |s, base| *s = s.max(*base));
                }
                if plan.posteriors {
                    add(&mut sums, *w, &x, &s, |_| delta);
                } else {
                    add(&mut sums, *w, &x, &s, |i| base[i].wide() + delta);
                }
            }
            shortage.look(&sums, fisher);
            if shortage.elements > 0 {
                // Nothing more is written, but the others are counted.
                continue;
            }
            // Only Fisher averaging gets here with s = 0, where no model has curvature: its limit is the plain average.
            let all = 1.0 - rest;
            update(&mut x, &sums, |x, [sx, s, plain, _]| {
                *x = T::from_wide(if *s > 0.0 { sx / s } else { plain / all });
            });
            self.write(at.start, &x)?;
            update(&mut x, &sums, |x, [_, s, ..]| *x = T::from_wide(*s));
            self.output.precision(at.start, &x)?;
        }
        match shortage.problem(self.len) {
            None => Ok(()),
            Some(problem) => Err(self.error(problem)),
        }
    }
}

/// Where a sum has no precision that is positive.
struct Shortage {
    elements: usize,
    /// The supremum of the factors on the negative weights for which all are positive.
    largest: f64,
}

impl Shortage {
    fn look(&mut self, sums: &[Sums], fisher: bool) {
        let bad = |[_, s, ..]: &Sums| !(s.is_finite() && (*s > 0.0 || fisher));
        // Almost always there is none, which `first` finds out faster than a loop that counts.
        if first(sums, bad).is_none() {
            return;
        }
        for [_, s, _, taken] in sums.iter().filter(|sums| bad(sums)) {
            self.elements += 1;
            // `min` passes over the NaN of an overflow.
            self.largest = self.largest.min((s + taken) / taken);
        }
    }

    fn problem(&self, len: usize) -> Option<String> {
        let Shortage { elements, largest } = self;
        let remedy = if largest.is_finite() {
            format!(
                "with all negative weights times a factor below {largest:e} there would be none; or merge posteriors by \
                 gradient matching with `clamp`, which takes a model's information beyond the base as at least 0"
            )
        } else {
            "expected a precision > 0 in at least one model".to_owned()
        };
        (*elements > 0).then(|| format!("merging leaves {elements} of its {len} precisions not positive: {remedy}"))
    }
}

/// The smallest s/s' over one tensor's elements, with the precision s of model 0 and s' of model 1: of s', weights
/// below this can be taken away.
pub(crate) fn smallest_ratio<T: Number>(
    plan: &Plan,
    name: &str,
    len: usize,
    inputs: &mut dyn Inputs<T>,
) -> crate::Result<f64> {
    struct Nowhere;
    impl<T> Output<T> for Nowhere {
        fn values(&mut self, _: usize, _: &[T]) -> crate::Result<()> {
            Ok(())
        }
    }
    let mut job = Job { plan, name, len, inputs, output: &mut Nowhere };
    let (mut s, mut part) = (Vec::new(), Vec::new());
    let mut smallest = f64::INFINITY;
    for at in job.chunks() {
        job.read_curvature(Input::Curvature(0), at.clone(), &mut s)?;
        job.read_curvature(Input::Curvature(1), at, &mut part)?;
        let ratios = s.par_iter().zip(&part).with_min_len(BLOCK).map(|(s, part)| s.wide() / part.wide());
        // 0/0: there is nothing of the part to take away, nor anything to take it from. Such an element sets no limit.
        smallest = ratios.filter(|r| !r.is_nan()).reduce(|| f64::INFINITY, f64::min).min(smallest);
    }
    Ok(smallest)
}
