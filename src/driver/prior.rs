//! What a prior is to a row: its weight decay, or an error. The priors themselves are in [`crate::prior`].

use super::arithmetic::delta;
use super::row::{Decay, Row};
use crate::prior::{Isotropic, PriorOf};
use crate::{Error, Result};

/// Writes an isotropic prior N(0, 1/P₀) into the settings as weight_decay = P₀/ess, so that everything computed from
/// the weight decay follows it (the rescaled learning rate of [`Ivon`](crate::Ivon)). Rows whose decay is not a prior
/// (AdamW) are left as they are.
pub(super) fn in_row<R: Row>(prior: &PriorOf, row: R) -> R {
    match prior {
        PriorOf::Isotropic(isotropic @ Isotropic::Precision(_)) if R::DECAY == Decay::Prior => {
            row.with_weight_decay(delta(*isotropic, &row))
        }
        _ => row,
    }
}

/// Errors if a row with these settings cannot have this prior.
pub(super) fn admits<R: Row>(prior: &PriorOf, row: &R) -> Result<()> {
    // The row's own decay needs no `ess`: it is on the scale of the mean loss already.
    if matches!(prior, PriorOf::Isotropic(Isotropic::WeightDecay)) {
        return row.validate();
    }
    if row.effective_sample_size().is_none() {
        return Err(Error::HyperParameter {
            name: "ess",
            value: "not set".to_owned(),
            expected: "the effective sample size, to put the prior's precision on the scale of the mean loss: \
                       .ess(60_000.0)",
        });
    }
    match prior {
        // Whatever the row demands of its weight decay, it demands of the prior that takes its place.
        PriorOf::Isotropic(isotropic) => row.with_weight_decay(delta(*isotropic, row)).validate(),
        PriorOf::Gaussian(_) => row.validate(),
    }
}
