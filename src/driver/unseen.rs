//! Weights that no evaluation of a step has spoken about, where these are to be left alone
//! ([`Builder::skip_unseen`](crate::Builder::skip_unseen)).
//!
//! They are put back after the update and not passed over in it: that would be a choice inside of the loop over the
//! weights, also of those who do not ask for it.

use super::sums::Sums;
use tch::Tensor;

/// Such weights of one parameter, with what they are.
pub(super) struct Unseen {
    /// True for each of them.
    mask: Tensor,
    /// Mean and state of the whole parameter, and copies of these.
    tensors: Vec<(Tensor, Tensor)>,
}

impl Unseen {
    /// Those of parameter number `i`; `None` if there are none, or if nobody asks. `kept`: where an update writes its mean
    /// and state, and where each of them is now.
    pub fn of<'a>(sums: &Sums, i: usize, kept: impl Iterator<Item = (&'a Tensor, &'a Tensor)>) -> Option<Self> {
        let size = sums.sizes.get(i)?.as_ref()?;
        // Squares of examples may be there where gradients cancel. None is negative, and those that are formed of the
        // gradient vanish with it.
        let mask = match sums.statistics.get(i).and_then(|s| s.first()) {
            Some(statistic) => size.eq(0.0).logical_and(&statistic.eq(0.0)),
            None => size.eq(0.0),
        };
        if mask.any().int64_value(&[]) == 0 {
            return None;
        }
        Some(Unseen { mask, tensors: kept.map(|(t, now)| (t.detach(), now.detach().copy())).collect() })
    }

    pub fn put_back(self) {
        for (mut t, before) in self.tensors {
            let after = before.where_self(&self.mask, &t);
            t.copy_(&after);
        }
    }
}
