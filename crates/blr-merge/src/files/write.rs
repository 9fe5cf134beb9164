//! The file or the shards that a merge writes.

use super::sources::{Reader, Sources};
use super::{Destination, Merged};
use crate::engine::{self, Number, Output, Plan};
use crate::storage::{DESCRIPTION, Entry, FileWriter, INDEX, PRECISION, StoredTensor, WeightFile, replace};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// Merges every tensor into a draft of the destination, which then takes its place.
pub(super) fn write(
    plan: &Plan,
    sources: &Sources,
    out: &Destination,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Merged> {
    let pattern = &sources.pattern().weights;
    let mut merged = Merged { tensors: 0, weights: 0, copied: Vec::new(), posterior: plan.posteriors };
    let shards = shards(sources, plan.posteriors, out.most);
    let total = shards.iter().flatten().map(|entry| entry.bytes).sum();
    let mut metadata = pattern.metadata().clone();
    if let Some(description) = metadata.remove(DESCRIPTION)
        && plan.posteriors
    {
        // Of plain weights it would say that they are a posterior.
        metadata.insert(DESCRIPTION.to_owned(), of_no_training(description));
    }
    let metadata = Some(metadata).filter(|m| !m.is_empty());
    let mut written = 0;
    let mut count = |bytes| {
        written += bytes;
        progress(written, total);
    };
    // Writes one file, called `path` in errors, at `draft`.
    let mut fill = |path: &Path, draft: &Path, entries: &[Entry]| {
        let mut file = FileWriter::create(path, draft, metadata.clone(), entries.to_vec(), &mut count)?;
        let weights = entries.iter().map(|entry| entry.name.as_str()).filter(|name| !pattern.is_precision(name));
        for name in weights {
            write_tensor(plan, sources, name, &mut file, &mut merged)?;
        }
        file.finish()
    };
    replace(&out.path, |draft| {
        if out.most.is_none() {
            return shards.iter().try_for_each(|entries| fill(&out.path, draft, entries));
        }
        let error = |e: std::io::Error| Error::file(&out.path, format!("cannot be written: {e}"));
        fs::create_dir(draft).map_err(error)?;
        let mut map = BTreeMap::new();
        for (i, entries) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
            fill(&out.path.join(&name), &draft.join(&name), entries)?;
            map.extend(entries.iter().map(|entry| (&entry.name, name.clone())));
        }
        let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": map});
        let mut file = File::create(draft.join(INDEX)).map_err(error)?;
        file.write_all(format!("{index:#}\n").as_bytes()).and_then(|()| file.sync_all()).map_err(error)
    })?;
    Ok(merged)
}

/// What is written, as files of at most so many bytes of tensors: at least one file, and exactly one without a limit.
fn shards(sources: &Sources, posteriors: bool, most: Option<u64>) -> Vec<Vec<Entry>> {
    let pattern = &sources.pattern().weights;
    let most = most.unwrap_or(u64::MAX);
    let (mut shards, mut room) = (vec![Vec::new()], most);
    for (name, t) in sources.weights() {
        let entry =
            |name: String, t: &StoredTensor| Entry { name, dtype: t.dtype, shape: t.shape.clone(), bytes: t.bytes() };
        let precision = pattern.precision_of(name).filter(|_| posteriors);
        let mut both = vec![entry(name.to_owned(), t)];
        both.extend(precision.map(|s| entry(format!("{name}{PRECISION}"), s)));
        let bytes = both.iter().map(|entry| entry.bytes).sum();
        if bytes > room && shards.last().is_some_and(|shard| !shard.is_empty()) {
            shards.push(Vec::new());
            room = most;
        }
        room = room.saturating_sub(bytes);
        shards.last_mut().expect("there is one from the start").extend(both);
    }
    shards
}

/// Merges or copies one tensor into a file that has a place for it.
fn write_tensor(plan: &Plan, sources: &Sources, name: &str, file: &mut FileWriter, merged: &mut Merged) -> Result<()> {
    let pattern: &WeightFile = &sources.pattern().weights;
    let t = &pattern.tensors()[name];
    if !t.is_floating() {
        file.copy(name, pattern, t)?;
        merged.copied.push(name.to_owned());
        return Ok(());
    }
    let mut reader = Reader::new(sources, name);
    let wide = reader.wide(plan.method)?;
    let precision = plan.posteriors.then(|| format!("{name}{PRECISION}"));
    let mut place = Place { file, name, precision };
    if wide {
        engine::merge::<f64, Error>(plan, name, t.elements(), &mut reader, &mut place)?;
    } else {
        engine::merge::<f32, Error>(plan, name, t.elements(), &mut reader, &mut place)?;
    }
    merged.tensors += 1;
    merged.weights += t.elements() as u64;
    Ok(())
}

/// Where one merged tensor goes.
struct Place<'a, 'b> {
    file: &'a mut FileWriter<'b>,
    name: &'a str,
    /// `<name>.precision`, if it is written.
    precision: Option<String>,
}

impl<T: Number> Output<T> for Place<'_, '_> {
    fn values(&mut self, at: usize, x: &[T]) -> Result<()> {
        self.file.elements(self.name, at, x)
    }

    fn precision(&mut self, at: usize, s: &[T]) -> Result<()> {
        self.precision.as_ref().map_or(Ok(()), |name| self.file.elements(name, at, s))
    }
}

/// The description of a posterior without what only the training of the pattern has: the damping of its noise, and the
/// share of its precision that was learned.
fn of_no_training(description: String) -> String {
    let Ok(mut all) = serde_json::from_str::<serde_json::Value>(&description) else { return description };
    if let Some(content) = all.get_mut("content").and_then(serde_json::Value::as_object_mut) {
        content.remove("damping");
        content.remove("learned");
    }
    all.to_string()
}
