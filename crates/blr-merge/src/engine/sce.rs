//! SCE: selects the elements that differ most, calculates the models' weights, erases the minority.

use super::Input;
use super::job::{Job, sum, update};
use super::rank::{Of, Top};
use crate::Error;
use crate::number::{BLOCK, Number, part_of};
use rayon::prelude::*;
use std::ops::Range;

/// The standard deviation of each element over the models. (That of their differences to the base is the same.)
fn deviation<T: Number>(x: &[Vec<T>]) -> Vec<T> {
    let n = x.len() as f64;
    let deviation = |i: usize| {
        let mean = x.iter().map(|x| x[i].wide()).sum::<f64>() / n;
        let variance = x.iter().map(|x| (x[i].wide() - mean).powi(2)).sum::<f64>() / n;
        // The root, for a variance may be too small for f32.
        T::from_wide(variance.sqrt())
    };
    (0..x[0].len()).into_par_iter().with_min_len(BLOCK).map(deviation).collect()
}

impl<T: Number, E: From<Error>> Job<'_, T, E> {
    /// Reads all models, for the deviation of each element.
    pub fn deviation(&mut self, at: Range<usize>, x: &mut Vec<Vec<T>>) -> Result<Vec<T>, E> {
        x.resize_with(self.plan.models.len(), Vec::new);
        for (k, x) in x.iter_mut().enumerate() {
            self.read(Input::Model(k), at.clone(), x)?;
        }
        Ok(deviation(x))
    }

    /// Reads the differences of all models, zero where the element is not selected.
    fn selected(
        &mut self,
        at: Range<usize>,
        top: Option<&mut Top>,
        base: &mut Vec<T>,
        d: &mut Vec<Vec<T>>,
    ) -> Result<(), E> {
        self.read(Input::Base, at.clone(), base)?;
        // Of the models, and not of the differences, whose rounding may order them in another way than the threshold's.
        let deviation = self.deviation(at, d)?;
        for d in d.iter_mut() {
            update(d, base, |d, base| *d = *d - *base);
        }
        let Some(top) = top else { return Ok(()) };
        let tops = top.blocks(&deviation);
        let blocks = deviation.par_chunks(BLOCK).zip(tops);
        let selected: Vec<bool> =
            blocks.flat_map_iter(|(x, mut top)| x.iter().map(move |x| top.takes(x.magnitude()))).collect();
        for d in d {
            d.par_iter_mut().zip(&selected).with_min_len(BLOCK).for_each(|(d, selected)| {
                if !selected {
                    *d = T::zero();
                }
            });
        }
        Ok(())
    }

    /// θ₀ + Σ η_k d_k / Σ η_k over the k of the elected sign.
    pub fn sce(&mut self, density: f64) -> Result<(), E> {
        let n = self.plan.models.len();
        let top = if density < 1.0 {
            Some(self.tops(Of::Deviation, &[part_of(density, self.len).max(1)])?[0][0])
        } else {
            None
        };
        let (mut base, mut d) = (Vec::new(), Vec::new());
        let mut squares = vec![0.0; n];
        let mut left = top;
        for at in self.chunks() {
            self.selected(at, left.as_mut(), &mut base, &mut d)?;
            for (square, d) in squares.iter_mut().zip(&d) {
                let blocks = d.par_chunks(BLOCK);
                *square += sum(blocks.map(|d| [d.iter().map(|d| d.wide() * d.wide()).sum::<f64>()]))[0];
            }
        }
        let all: f64 = squares.iter().sum();
        let eta: Vec<T> =
            squares.iter().map(|s| T::from_wide(if all > 0.0 { s / all } else { 1.0 / n as f64 })).collect();
        let mut left = top;
        for at in self.chunks() {
            self.selected(at.clone(), left.as_mut(), &mut base, &mut d)?;
            let d = &d;
            base.par_chunks_mut(BLOCK).enumerate().for_each(|(block, base)| {
                for (i, theta) in base.iter_mut().enumerate() {
                    let at = |k: usize| d[k][block * BLOCK + i];
                    let positive = (0..n).fold(T::zero(), |sum, k| sum + at(k)) >= T::zero();
                    let agrees = |d: T| if positive { d > T::zero() } else { d < T::zero() };
                    let agreeing = (0..n).filter(|k| agrees(at(*k)));
                    let (total, share) = agreeing
                        .fold((T::zero(), T::zero()), |(total, share), k| (total + eta[k] * at(k), share + eta[k]));
                    // Nobody agrees where all differences are zero, and where a share is, so are the differences.
                    if share > T::zero() {
                        *theta = *theta + total / share;
                    }
                }
            });
            self.write(at.start, &base)?;
        }
        Ok(())
    }
}
