//! The greedy soup: of many fine-tunes, the average of those that make it better.

use super::sources::names;
use super::{Destination, FileModel, Merged, merge_files};
use crate::storage::Draft;
use crate::{Error, Method, Recipe, Result};
use std::fs;
use std::path::Path;

/// Which of two scores is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// The higher, as of an accuracy.
    Higher,
    /// The lower, as of a loss.
    Lower,
}

impl Better {
    /// Whether the score is not worse than another.
    fn keeps(self, score: f64, other: f64) -> bool {
        match self {
            Better::Higher => score >= other,
            Better::Lower => score <= other,
        }
    }
}

/// What [`soup_files`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct Soup {
    /// Every model and its own score, the best first.
    pub scores: Vec<(String, f64)>,
    /// The models in the soup, in the order in which they were added.
    pub chosen: Vec<String>,
    /// The soup's score.
    pub score: f64,
    /// The merge that was written.
    pub merged: Merged,
}

/// The greedy soup (Wortsman et al., *Model soups*, 2022): the models are sorted by their own scores, of equal ones the
/// first given first. The soup begins with the best; each of the others is added to the average if the score of that
/// does not get worse. Of N models that takes 2N - 1 evaluations.
///
/// `recipe` is that of the average; models may have weights. `evaluate` is given the path of a candidate, written as
/// the result would be; [`evaluate`](super::evaluate()) runs a command. Candidates are beside `out`, one at a time, and
/// none is left behind.
///
/// # Errors
/// As [`merge_files`]; [`Error::Merge`] for another method; those of `evaluate`; [`Error::HyperParameter`] for a score
/// that is not a number. `out` is then as it was before.
pub fn soup_files(
    recipe: impl Into<Recipe>,
    models: &[FileModel],
    better: Better,
    evaluate: &mut dyn FnMut(&Path) -> Result<f64>,
    out: impl Into<Destination>,
) -> Result<Soup> {
    let (recipe, out) = (recipe.into(), out.into());
    if recipe.method != Method::linear() {
        return Err(Error::Merge(format!("a soup is an average, and the recipe's method is `{}`", recipe.method)));
    }
    let names = names(models)?;
    // With their names, which would otherwise depend on the company they are in.
    let models: Vec<FileModel> = models.iter().zip(&names).map(|(model, name)| model.clone().name(name)).collect();
    // What could not be written in the end is said at once.
    drop(out.draft()?);
    // By the name, as `merged/` ends with a slash, behind which they would be inside.
    let mut beside = out.path.file_name().unwrap_or_default().to_os_string();
    beside.push(".candidates");
    let folder = Draft::of_folder(out.path.with_file_name(beside))?;
    let mut score = |models: &[FileModel]| {
        let path = folder.path().join("candidate.safetensors");
        merge_files(recipe.clone(), None, models, Destination { path: path.clone(), ..out.clone() }, &mut |_, _| ())?;
        let score = evaluate(&path)?;
        Error::unless(!score.is_nan(), "score", score, "a number")?;
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(|e| Error::file(&path, format!("cannot be removed: {e}")))?;
        Ok(score)
    };
    let mut scored: Vec<(&FileModel, String, f64)> = Vec::new();
    for (model, name) in models.iter().zip(names) {
        scored.push((model, name, score(std::slice::from_ref(model))?));
    }
    // Stable, so that equal ones stay in order.
    scored.sort_by(|(_, _, a), (_, _, b)| if better == Better::Higher { b.total_cmp(a) } else { a.total_cmp(b) });
    let Some((best, name, mut reached)) = scored.first().cloned() else {
        return Err(Error::Merge("there is no model".to_owned()));
    };
    let (mut soup, mut chosen) = (vec![best.clone()], vec![name]);
    for (model, name, _) in &scored[1..] {
        soup.push((*model).clone());
        let found = score(&soup)?;
        if better.keeps(found, reached) {
            reached = found;
            chosen.push(name.clone());
        } else {
            soup.pop();
        }
    }
    let merged = merge_files(recipe.clone(), None, &soup, out.clone(), &mut |_, _| ())?;
    Ok(Soup {
        scores: scored.into_iter().map(|(_, name, score)| (name, score)).collect(),
        chosen,
        score: reached,
        merged,
    })
}
