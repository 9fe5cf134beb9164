//! A range test for the learning rate, after which everything is as before.

use super::arithmetic::{Arithmetic, Unit};
use super::average::Average;
use super::compiled::Closure;
use super::divergence::Divergence;
use super::row::Row;
use super::skip::Skips;
use super::sums::Sums;
use super::{Clipped, Last, Optimizer};
use crate::gradient::IntoTensor;
use crate::params::Buffers;
use crate::{Error, Result, Schedule, check};
use std::ops::RangeInclusive;
use tch::Tensor;

/// Decay of the average of the losses, which is over some ten steps.
const BETA: f64 = 0.9;

/// What [`Optimizer::lr_find`] has seen.
#[derive(Debug, Clone, PartialEq)]
pub struct LrRange {
    /// Learning rates in rising order, and the average of the loss when they were tried. It ends where the loss or a
    /// gradient was not finite.
    pub tried: Vec<(f64, f64)>,
}

impl LrRange {
    /// The learning rate at which the average of the loss was lowest.
    pub fn lowest(&self) -> f64 {
        let lower = |a: (f64, f64), b: (f64, f64)| if b.1 < a.1 { b } else { a };
        self.tried.iter().copied().reduce(lower).map_or(f64::NAN, |(lr, _)| lr)
    }

    /// A fifth of that: the loss still falls there, and a whole training bears less than a few steps do.
    pub fn suggestion(&self) -> f64 {
        0.2 * self.lowest()
    }
}

impl<R: Row> Optimizer<R> {
    /// Tries learning rates (Smith, *Cyclical Learning Rates for Training Neural Networks*, 2017): takes `steps` steps,
    /// each at a larger one, from the one end of `range` to the other by equal factors, for all parameters and without
    /// the schedule. Then weights, state, accumulators, step count, learning rates and the store's buffers are as they
    /// were, from a copy in memory; only libtorch's own generator has moved on (dropout).
    ///
    /// The loss of a batch is noisy and the test is short, so that the result is a start and no optimum. A row with a
    /// schedule of its own, as [`Ivon::auto`](crate::Ivon::auto), wants a learning rate like Adam's, and needs this
    /// least.
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// use tch_blr::Ivon;
    /// # fn main() -> tch_blr::Result<()> {
    /// # let (x, y) = (Tensor::randn([8, 4], (Kind::Float, Device::Cpu)), Tensor::zeros([8], (Kind::Int64, Device::Cpu)));
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root(), 4, 3, Default::default());
    /// let mut opt = Ivon::default().ess(60_000.0).hess_init(0.01).build(&vs, 0.0)?;
    /// let range = opt.lr_find(1e-4..=1e2, 100, || net.forward(&x).cross_entropy_for_logits(&y))?;
    /// opt.set_lr(range.suggestion())?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Ends of the range that are not positive and finite or not in order, fewer than two steps, what
    /// [`Optimizer::step`] refuses, a closure that creates variables.
    pub fn lr_find<L: IntoTensor>(
        &mut self,
        range: RangeInclusive<f64>,
        steps: usize,
        mut closure: impl FnMut() -> L,
    ) -> Result<LrRange> {
        (self.compiled.lr_find)(self, range, steps, &mut |_| closure().into_tensor())
    }

    pub(super) fn lr_found(
        &mut self,
        range: RangeInclusive<f64>,
        steps: usize,
        closure: &mut Closure,
    ) -> Result<LrRange> {
        let (from, to) = (*range.start(), *range.end());
        check::positive("lr range's start", from)?;
        check::that("lr range's end", to, to.is_finite() && to > from, "a number above the range's start")?;
        check::that("lr_find's steps", steps, steps > 1, "2 or more")?;
        self.welcome()?;
        let before = self.prepare().and_then(|()| Snapshot::take(self));
        let before = Some(self.told(before)?);
        let mut test = Test { before, opt: self };
        let tried = test.opt.tried((from, to / from), steps, closure);
        test.end()?;
        Ok(LrRange { tried: tried? })
    }

    fn tried(&mut self, (from, factor): (f64, f64), steps: usize, closure: &mut Closure) -> Result<Vec<(f64, f64)>> {
        let (parameters, mut tried) = (self.params.len(), Vec::new());
        let mut average = Average::new(BETA);
        for i in 0..steps {
            let lr = from * factor.powf(i as f64 / (steps - 1) as f64);
            self.set_lr(lr)?;
            let loss = match (self.compiled.step_chunks)(self, 1, closure) {
                // Left out by `skip_non_finite`.
                Ok(value) if !value.is_finite() => Err(Error::NonFiniteLoss { value, step: self.steps }),
                found => found,
            };
            match loss {
                Ok(loss) => average = average.with(loss),
                // At the smallest rate it is an error as ever, and at larger ones the end.
                Err(
                    Error::NonFiniteLoss { .. } | Error::NonFiniteGradient { .. } | Error::NotPositiveDefinite { .. },
                ) if i > 0 => break,
                Err(e) => return Err(e),
            }
            tried.push((lr, average.value()));
            self.params.refresh();
            if self.params.len() != parameters {
                let problem = "lr_find's closure creates variables: call it once before";
                return Err(Error::Parameters(problem.to_owned()));
            }
        }
        Ok(tried)
    }
}

/// Puts everything back when it ends, also while a panic of the closure unwinds.
struct Test<'a, R: Row> {
    before: Option<Snapshot>,
    opt: &'a mut Optimizer<R>,
}

impl<R: Row> Test<'_, R> {
    fn end(&mut self) -> Result<()> {
        self.before.take().map_or(Ok(()), |before| before.restore(self.opt))
    }
}

impl<R: Row> Drop for Test<'_, R> {
    fn drop(&mut self) {
        _ = self.end();
    }
}

/// Everything that steps change.
struct Snapshot {
    units: Vec<OfUnit>,
    buffers: Buffers,
    sums: Sums,
    steps: u64,
    last: Option<Last>,
    skips: Skips,
    divergence: Option<Divergence>,
    clipped: Clipped,
    lr: f64,
    schedule: Schedule,
}

struct OfUnit {
    steps: u64,
    lr: f64,
    mean: Tensor,
    state: Vec<(usize, Tensor)>,
}

impl Snapshot {
    /// Also puts an accumulation aside, and schedule and watch.
    fn take<R: Row>(opt: &mut Optimizer<R>) -> Result<Self> {
        let unit = |unit: &Unit<R>| {
            let mut tensors = R::Arithmetic::tensors(unit, &opt.params)?.into_iter();
            let mean = tensors.next().map_or_else(Tensor::new, |(_, mean)| mean.copy());
            let number = |name: &str| R::STATE.iter().position(|state| name.strip_prefix("state.") == Some(state));
            let state = tensors.filter_map(|(name, t)| Some((number(&name)?, t.copy()))).collect();
            Ok(OfUnit { steps: unit.steps, lr: unit.lr, mean, state })
        };
        Ok(Snapshot {
            units: opt.units.iter().map(unit).collect::<Result<_>>()?,
            buffers: Buffers::new(&opt.params),
            sums: std::mem::take(&mut opt.sums),
            steps: opt.steps,
            last: opt.last,
            skips: opt.skips,
            divergence: opt.divergence.take(),
            clipped: opt.clipped,
            lr: opt.lr,
            schedule: std::mem::replace(&mut opt.schedule, Schedule::Constant),
        })
    }

    fn restore<R: Row>(self, opt: &mut Optimizer<R>) -> Result<()> {
        for (unit, saved) in opt.units.iter_mut().zip(self.units) {
            R::Arithmetic::restore(unit, &opt.params, &saved.mean, saved.state)?;
            (unit.steps, unit.lr) = (saved.steps, saved.lr);
        }
        self.buffers.restored();
        (opt.sums, opt.steps, opt.last, opt.skips) = (self.sums, self.steps, self.last, self.skips);
        (opt.divergence, opt.clipped, opt.lr, opt.schedule) = (self.divergence, self.clipped, self.lr, self.schedule);
        Ok(())
    }
}
