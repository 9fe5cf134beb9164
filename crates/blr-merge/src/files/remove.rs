//! Taking a part out of a posterior's file.

use super::sources::{Reader, Sources, names};
use super::write::write;
use super::{Destination, FileModel, Merged, Work, weighted};
use crate::engine::{Plan, smallest_ratio};
use crate::{Error, Method, Recipe, Result, Role};
use std::path::PathBuf;

/// Takes `weight` times `part` out of the posterior `q`, both posteriors' files: the natural parameters of `q` less
/// `weight` times those of `part`. Weight > 0.
///
/// What `part` holds is taken away, all of it. If it was learned with a prior, that prior goes as well;
/// `Method::Combine` with the weights 1, -1 and 1 for `q`, `part` and the prior keeps it.
///
/// # Errors
/// As [`merge_files`](super::merge_files); [`Error::Removal`], with the limit of the weights that are possible, if `q`
/// holds less precision in any weight than is to be taken.
pub fn remove_files(
    q: impl Into<PathBuf>,
    part: impl Into<PathBuf>,
    weight: f64,
    out: impl Into<Destination>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Merged> {
    let out = out.into();
    Error::unless(weight.is_finite() && weight > 0.0, "weight", weight, "a finite number > 0")?;
    let models = [FileModel::new(q), FileModel::new(part).weight(-weight)];
    let names = names(&models)?;
    let recipe = Recipe::new(Method::Combine);
    let plan = Plan { method: Method::Combine, models: weighted(&names, &models), posteriors: true };
    let draft = out.draft()?;
    let sources = Sources::open(&recipe, None, &models)?;
    // A pass over the precisions alone, for an error that says how much would be possible; a merge that fails can only
    // say where.
    let (mut largest, mut what) = (f64::INFINITY, String::new());
    for (name, tensor) in sources.tensors().filter(|(_, tensor)| tensor.role == Role::Weight) {
        let mut reader = Reader::new(&sources, name);
        let len = tensor.like.elements();
        let ratio = if reader.wide(plan.method)? {
            smallest_ratio::<f64>(&plan, name, len, &mut reader)?
        } else {
            smallest_ratio::<f32>(&plan, name, len, &mut reader)?
        };
        if ratio < largest {
            (largest, what) = (ratio, format!("parameter `{name}`"));
        }
    }
    if weight >= largest {
        return Err(Error::Removal { what, weight, largest });
    }
    write(&Work::new(&recipe, plan.models, sources)?, &out, draft, progress)
}
