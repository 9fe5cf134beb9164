//! The file or the shards that a merge writes.

use super::sources::{Reader, Sources, Tensor};
use super::{Destination, Merged, Work};
use crate::engine::{self, Inputs, Number, Output};
use crate::number::CHUNK;
use crate::storage::{DESCRIPTION, Draft, Entry, FileWriter, INDEX, PRECISION, StoredTensor};
use crate::{Error, Result, Role};
use safetensors::Dtype;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Merges every tensor into a draft of the destination, which then takes its place.
pub(super) fn write(
    work: &Work,
    out: &Destination,
    draft: Draft,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Merged> {
    let (sources, posterior) = (&work.sources, work.posteriors);
    keeps_models_whole(sources, &out.path)?;
    let mut merged = Merged { tensors: 0, weights: 0, averaged: Vec::new(), copied: Vec::new(), posterior };
    let shards = shards(work, out);
    let total = shards.iter().flatten().map(Entry::bytes).sum();
    let metadata = metadata(sources, posterior);
    let mut written = 0;
    let mut count = |bytes| {
        written += bytes;
        progress(written, total);
    };
    // Fills one file, which is called `path` in errors.
    let mut fill = |path: &Path, file: &File, entries: &[Entry]| {
        let mut writer = FileWriter::new(path, file, &metadata, entries.to_vec(), &mut count)?;
        let weights = entries.iter().map(|entry| entry.name.as_str());
        for name in weights.filter(|name| !(posterior && sources.pattern().file().is_precision(name))) {
            write_tensor(work, name, &mut writer, &mut merged)?;
        }
        Ok(())
    };
    if out.most.is_none() {
        shards.iter().try_for_each(|entries| fill(&out.path, draft.output(), entries))?;
        draft.commit()?;
        return Ok(merged);
    }
    let error = |e: std::io::Error| Error::file(&out.path, format!("cannot be written: {e}"));
    let mut map = BTreeMap::new();
    for (i, entries) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        let file = File::create_new(draft.path().join(&name)).map_err(error)?;
        fill(&out.path.join(&name), &file, entries)?;
        file.sync_all().map_err(error)?;
        map.extend(entries.iter().map(|entry| (&entry.name, name.clone())));
    }
    let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": map});
    let mut file = File::create_new(draft.path().join(INDEX)).map_err(error)?;
    file.write_all(format!("{index:#}\n").as_bytes()).and_then(|()| file.sync_all()).map_err(error)?;
    draft.commit()?;
    Ok(merged)
}

/// Refuses a result in the place of one of several shards of a model, which would be broken. (A whole input may be
/// replaced: it is read before, and remains open.)
fn keeps_models_whole(sources: &Sources, out: &Path) -> Result<()> {
    let Ok(out) = out.canonicalize() else { return Ok(()) };
    for file in sources.files().filter(|file| file.shards().count() > 1) {
        if file.shards().any(|shard| shard.canonicalize().is_ok_and(|shard| shard == out)) {
            let problem =
                format!("is a shard of {}, which would be broken; choose another name", file.path().display());
            return Err(Error::file(&out, problem));
        }
    }
    Ok(())
}

/// What the result says about itself.
fn metadata(sources: &Sources, posteriors: bool) -> HashMap<String, String> {
    let mut metadata = sources.pattern().file().metadata().clone();
    let description = metadata.remove(DESCRIPTION).filter(|_| posteriors);
    // Without it, the result is plain weights.
    if let Some(mut description) = description.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok()) {
        // Of the training, which the merge is not: the share of the precision that it has learned, and the damping of
        // its noise.
        if let Some(content) = description.get_mut("content").and_then(serde_json::Value::as_object_mut) {
            content.remove("learned");
            content.remove("damping");
        }
        metadata.insert(DESCRIPTION.to_owned(), description.to_string());
    }
    metadata
}

/// What is written of a tensor: itself, and the precision that it has in a posterior.
pub(super) fn entries(work: &Work, out: &Destination, name: &str, tensor: &Tensor) -> Vec<Entry> {
    let entry = |name: String, t: &StoredTensor| {
        let dtype = out.dtype.filter(|_| t.is_floating()).unwrap_or(tensor.dtype);
        Entry { name, dtype, shape: t.shape.clone() }
    };
    let precision = work.sources.pattern().file().precision_of(name).filter(|_| work.posteriors);
    let mut both = vec![entry(name.to_owned(), &tensor.like)];
    both.extend(precision.map(|s| entry(format!("{name}{PRECISION}"), s)));
    both
}

/// What is written, as files of at most so many bytes of tensors: at least one file, and exactly one without a limit.
fn shards(work: &Work, out: &Destination) -> Vec<Vec<Entry>> {
    let most = out.most.unwrap_or(u64::MAX);
    let (mut shards, mut room) = (vec![Vec::new()], most);
    for (name, tensor) in work.sources.tensors() {
        let both = entries(work, out, name, tensor);
        let bytes = both.iter().map(Entry::bytes).sum();
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
fn write_tensor(work: &Work, name: &str, file: &mut FileWriter, merged: &mut Merged) -> Result<()> {
    let sources = &work.sources;
    let tensor = sources.tensor(name);
    let elements = tensor.like.elements();
    let mut reader = Reader::new(sources, name);
    let plan = match tensor.role {
        Role::Kept => {
            let pattern = sources.pattern().file();
            if sources.pattern().changed(name) {
                let mut x = Vec::new();
                for at in (0..elements).step_by(CHUNK) {
                    x.resize(CHUNK.min(elements - at), 0f64);
                    reader.read(sources.pattern_input(), at, &mut x)?;
                    file.elements(name, at, &x)?;
                }
            } else {
                file.copy(name, pattern, &tensor.like)?;
            }
            if let Some(s) = pattern.precision_of(name).filter(|_| work.posteriors) {
                file.copy_precisions(name, &format!("{name}{PRECISION}"), pattern, s)?;
            }
            merged.copied.push(name.to_owned());
            return Ok(());
        }
        Role::Statistic => {
            merged.averaged.push(name.to_owned());
            work.plan(name)?.average()
        }
        Role::Weight => {
            merged.tensors += 1;
            merged.weights += elements as u64;
            work.plan(name)?
        }
    };
    // Also for a result in f64, which would otherwise have the digits of f32.
    let wide = reader.wide(plan.method)? || file.dtype(name) == Dtype::F64;
    let precision = work.posteriors.then(|| format!("{name}{PRECISION}"));
    let mut place = Place { file, name, precision };
    if wide {
        engine::merge::<f64, Error>(&plan, name, elements, &mut reader, &mut place)
    } else {
        engine::merge::<f32, Error>(&plan, name, elements, &mut reader, &mut place)
    }
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
        self.precision.as_ref().map_or(Ok(()), |name| self.file.precisions(self.name, name, at, s))
    }
}
