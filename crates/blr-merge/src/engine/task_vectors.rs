//! Sums of differences to the base: task arithmetic, TIES, DARE and their kind. Which elements of a difference are kept
//! is decided in select.rs.

use super::Input;
use super::job::Job;
use crate::Error;
use crate::method::TaskVectors;
use crate::number::{BLOCK, Number};
use rayon::prelude::*;

impl<T: Number, E: From<Error>> Job<'_, T, E> {
    /// θ₀ + λ Σ w_k d_k
    pub fn task_vectors(&mut self, v: &TaskVectors) -> Result<(), E> {
        let mut selections = self.selections(v.keep)?;
        let weights: Vec<T> = self.plan.models.iter().map(|(_, w)| T::from_wide(*w)).collect();
        let lambda = T::from_wide(v.lambda);
        let all = weights.iter().fold(T::zero(), |sum, w| sum + *w);
        let mut base = Vec::new();
        let mut differences = vec![Vec::new(); weights.len()];
        for at in self.chunks() {
            self.read(Input::Base, at.clone(), &mut base)?;
            for (k, (d, selection)) in differences.iter_mut().zip(&mut selections).enumerate() {
                self.difference(k, at.clone(), &base, d)?;
                selection.apply(at.start, d);
            }
            let differences = &differences;
            base.par_chunks_mut(BLOCK).enumerate().for_each(|(block, base)| {
                let terms =
                    |i: usize| weights.iter().zip(differences).map(move |(w, d)| (*w, *w * d[block * BLOCK + i]));
                for (i, theta) in base.iter_mut().enumerate() {
                    let mut total = terms(i).fold(T::zero(), |sum, (_, wd)| sum + wd);
                    let mut share = all;
                    if v.elect_signs {
                        let positive = total >= T::zero();
                        // Dropped elements are zero, and agree with neither sign.
                        let agrees = |wd: T| if positive { wd > T::zero() } else { wd < T::zero() };
                        (share, total) = terms(i)
                            .filter(|(_, wd)| agrees(*wd))
                            .fold((T::zero(), T::zero()), |(share, total), (w, wd)| (share + w, total + wd));
                    }
                    // Nobody agrees where all differences are zero: the base stays as it is.
                    if v.normalize && share != T::zero() {
                        total = total / share;
                    }
                    *theta = *theta + lambda * total;
                }
            });
            self.write(at.start, &base)?;
        }
        Ok(())
    }
}
