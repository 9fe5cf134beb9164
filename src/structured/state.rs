//! Structured optimizer ↔ one checkpoint file.

use super::{Kept, StructuredOptimizer, StructuredRule, check_change};
use crate::gradient::Clip;
use crate::kernel::{self, Noise, Philox};
use crate::params::Leaf;
use crate::storage::checkpoint;
use crate::{Error, Result, Schedule};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::Tensor;

fn form<R: StructuredRule>() -> String {
    format!("{} optimizer", R::NAME)
}

/// Everything that is not a tensor.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content<R> {
    config: R,
    schedule: Schedule,
    clip: Option<Clip>,
    /// Absent if the noise was given as tensors.
    noise: Option<Philox>,
    steps: u64,
    /// Names of the parameters of each block.
    blocks: Vec<Vec<String>>,
    /// Configuration of each block.
    configs: Vec<R>,
}

impl<R: StructuredRule> StructuredOptimizer<R> {
    /// Writes means, state, configuration, schedule, step count and noise position to one safetensors file, which is
    /// replaced atomically: tensors `mean.<block>` and `state.<name>.<block>`, blocks counted from 0.
    ///
    /// Not in it: frozen variables and buffers (save the [`VarStore`](tch::nn::VarStore) for those), and noise given as
    /// tensors.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut tensors = Vec::new();
        let mut blocks = Vec::new();
        for (b, block) in self.blocks.iter().enumerate() {
            tensors.push((format!("mean.{b}"), block.mean_now(&self.params)?));
            for (name, t) in R::STATE.iter().zip(&block.state) {
                tensors.push((format!("state.{name}.{b}"), t.shallow_clone()));
            }
            blocks.push(block.leaves(&self.params).iter().map(|leaf| leaf.name().to_owned()).collect());
        }
        let noise = if let Noise::Philox(p) = &self.noise { Some(*p) } else { None };
        let (schedule, clip, steps) = (self.schedule, self.clip, self.steps);
        let configs = self.blocks.iter().map(|block| block.config).collect();
        let content = Content { config: self.config, schedule, clip, noise, steps, blocks, configs };
        checkpoint::save(path.as_ref(), &form::<R>(), &tensors, &content)
    }

    /// Takes up training where [`StructuredOptimizer::save`] left it. The optimizer must be of the same row, over the same
    /// trainable parameters in the same order; the device may be another.
    ///
    /// # Errors
    /// A file that cannot be read, is broken, or belongs to another row or model. Nothing has changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let refused = |problem: String| Error::file(path, problem);
        let (mut tensors, content): (_, Content<R>) = checkpoint::load(path, &form::<R>())?;
        self.params.refresh();
        self.check()?;
        content.config.validate().map_err(|e| Error::file(path, e))?;
        for config in &content.configs {
            check_change(&content.config, config).map_err(|e| Error::file(path, e))?;
        }
        content.schedule.validate().map_err(|e| Error::file(path, e))?;
        content.clip.map_or(Ok(()), Clip::validate).map_err(|e| Error::file(path, e))?;
        if content.steps >= kernel::STEPS {
            return Err(refused(format!("counts {} steps, which cannot be", content.steps)));
        }
        let fits = content.blocks.len() == self.blocks.len()
            && content.configs.len() == self.blocks.len()
            && self.blocks.iter().zip(&content.blocks).all(|(block, names)| {
                let leaves = block.leaves(&self.params);
                leaves.len() == names.len() && leaves.iter().zip(names).all(|(leaf, name)| leaf.names.contains(name))
            });
        if !fits {
            let ours: Vec<&str> = self.blocks.iter().flat_map(|b| b.leaves(&self.params)).map(Leaf::name).collect();
            let theirs = content.blocks.concat().join(", ");
            return Err(refused(format!("is of the parameters ({theirs}): expected ({})", ours.join(", "))));
        }
        let mut restored = Vec::new();
        for (b, block) in self.blocks.iter().enumerate() {
            let mut take = |name: String, like: &Tensor| {
                let t = tensors.remove(&name).ok_or_else(|| refused(format!("has no tensor `{name}`")))?;
                if (t.kind(), t.size()) != (like.kind(), like.size()) {
                    let (found, expected) = ((t.kind(), t.size()), (like.kind(), like.size()));
                    return Err(refused(format!("tensor `{name}` is {found:?}: expected {expected:?}")));
                }
                if let Some(value) = kernel::first_non_finite(&t) {
                    return Err(refused(format!("tensor `{name}` is not finite ({value})")));
                }
                Ok(t.to_device(block.mean.device()))
            };
            let mean = take(format!("mean.{b}"), &block.mean)?;
            let initial = content.configs[b].initial(&block.mean);
            let state = R::STATE.iter().zip(&initial).map(|(name, like)| take(format!("state.{name}.{b}"), like));
            restored.push((mean, state.collect::<Result<Vec<_>>>()?));
        }
        if let Some(name) = tensors.keys().next() {
            return Err(refused(format!("has a tensor `{name}` that belongs to nothing")));
        }
        let _no_grad = tch::no_grad_guard();
        for ((block, (mean, state)), config) in self.blocks.iter_mut().zip(restored).zip(content.configs) {
            *block = Kept { members: std::mem::take(&mut block.members), config, mean, state };
        }
        self.write()?;
        self.config = content.config;
        self.schedule = content.schedule;
        self.clip = content.clip;
        self.steps = content.steps;
        if let Some(p) = content.noise {
            self.noise = p.into();
        }
        Ok(())
    }
}
