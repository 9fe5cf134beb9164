//! Selections by features: of examples as points, whatever the model predicts for them. Selections by a score are in
//! `stream.rs`.

use super::error;
use crate::{Result, check, kernel};
use tch::{Kind, Tensor};

/// k examples that cover the features `[n, d]`, or all if there are no more: beginning with `first`, always the one
/// that is furthest from those chosen (Gonzalez 1985; the coresets of VCL). No example is then further from its nearest
/// one than twice what k centres could do at best. Memory grows with n, time with nkd.
///
/// # Errors
/// k = 0, features of another shape or not finite, `first` outside of 0..n.
pub fn k_centre(features: &Tensor, k: usize, first: i64) -> Result<Vec<i64>> {
    let _no_grad = tch::no_grad_guard();
    let (x, n) = matrix(features, k)?;
    if !(0..n).contains(&first) {
        return Err(error(format!("first = {first}: expected a position of {n} examples, 0 to {}", n - 1)));
    }
    let (mut chosen, mut next) = (Vec::new(), first);
    let mut distance = Tensor::f_full([n], f64::INFINITY, (Kind::Double, x.device()))?;
    while chosen.len() < k.min(n as usize) {
        chosen.push(next);
        let to_next = (&x - x.f_select(0, next)?).f_square()?.f_sum_dim_intlist(1, false, Kind::Double)?;
        distance = distance.f_minimum(&to_next)?;
        // Below every distance, so that it is not chosen again even where all examples are in one place.
        let _ = distance.f_select(0, next)?.f_fill_(-1.0)?;
        next = distance.f_argmax(0, false)?.int64_value(&[]);
    }
    Ok(chosen)
}

/// k examples whose mean is that of the features `[n, d]`, or all if there are no more: each the one that brings the
/// mean of those chosen closest to it (Rebuffi et al. 2017, *iCaRL*). The first of them are a good choice for a smaller
/// k.
///
/// # Errors
/// k = 0, features of another shape or not finite.
pub fn herding(features: &Tensor, k: usize) -> Result<Vec<i64>> {
    let _no_grad = tch::no_grad_guard();
    let (x, n) = matrix(features, k)?;
    let mean = x.f_mean_dim(0, false, Kind::Double)?;
    let free = Tensor::f_zeros([n], (Kind::Double, x.device()))?;
    let (mut chosen, mut sum) = (Vec::new(), mean.zeros_like());
    while chosen.len() < k.min(n as usize) {
        // The mean of the choice, had it each example as the next.
        let with = (&x + &sum) / (chosen.len() + 1) as f64;
        let off = (with - &mean).f_square()?.f_sum_dim_intlist(1, false, Kind::Double)? + &free;
        let next = off.f_argmin(0, false)?.int64_value(&[]);
        // Infinitely far off from now on: added to its distance, it keeps the example from being chosen twice.
        let _ = free.f_select(0, next)?.f_fill_(f64::INFINITY)?;
        sum += x.f_select(0, next)?;
        chosen.push(next);
    }
    Ok(chosen)
}

fn matrix(features: &Tensor, k: usize) -> Result<(Tensor, i64)> {
    check::count("k", k)?;
    let &[n, _] = &features.size()[..] else {
        return Err(error(format!("the features are {:?}: expected [n, d], a row per example", features.size())));
    };
    if let Some(value) = kernel::first_non_finite(&features.detach()) {
        return Err(error(format!("the features are not finite ({value})")));
    }
    if n == 0 {
        return Err(error("there are no examples to choose from"));
    }
    Ok((features.detach().to_kind(Kind::Double), n))
}
