//! z = E\[token\], and its per-example gradients by keys of example and token.

use super::tape::{Rule, Tap};
use crate::Result;
use std::borrow::Borrow;
use tch::nn::{EmbeddingConfig, Module, Path};
use tch::{Kind, Tensor};

/// A lookup table z = E\[token\] that can be tapped.
#[derive(Debug)]
pub struct Embedding {
    /// E `[num_embeddings, embedding_dim]`, the variable `weight`.
    pub ws: Tensor,
    config: EmbeddingConfig,
}

/// Creates a lookup table for tokens `[B]` or `[B, …]` as [`tch::nn::embedding`] does.
///
/// The vector of the padding token is zero, whatever noise a posterior puts on its row: no loss ever depends on that
/// row, so that nothing holds its noise down, and it would be added to every example that is padded. (tch leaves the
/// row as initialized and looks it up like others; PyTorch sets it to zero at the start.)
///
/// Not tapped with one token `[]`, and not with `sparse` or `scale_grad_by_freq`: the latter divides by counts over the
/// whole batch, so that single examples have no gradients.
pub fn embedding<'a, T: Borrow<Path<'a>>>(
    vs: T,
    num_embeddings: i64,
    embedding_dim: i64,
    config: EmbeddingConfig,
) -> Embedding {
    let ws = tch::nn::embedding(vs, num_embeddings, embedding_dim, config).ws;
    let embedding = Embedding { ws, config };
    if let Some(padding) = embedding.padding() {
        // So that files show what the model computes with.
        let _no_grad = tch::no_grad_guard();
        let _ = embedding.ws.narrow(0, padding, 1).zero_();
    }
    embedding
}

impl Embedding {
    /// The padding token, if it is in the table; tch's default of -1 is not.
    fn padding(&self) -> Option<i64> {
        Some(self.config.padding_idx).filter(|token| (0..self.ws.size()[0]).contains(token))
    }
}

impl Module for Embedding {
    fn forward(&self, xs: &Tensor) -> Tensor {
        let EmbeddingConfig { padding_idx, scale_grad_by_freq, sparse, .. } = self.config;
        let z = Tensor::embedding(&self.ws, xs, padding_idx, scale_grad_by_freq, sparse);
        let z = match Tap::of(&z) {
            Some(mut tap) if xs.dim() > 0 && !scale_grad_by_freq && !sparse => {
                let table = Table { tokens: xs.shallow_clone(), entries: self.ws.size()[0], padding_idx };
                tap.uses(Some(&self.ws), table);
                tap.finish()
            }
            _ => z,
        };
        // Filled and not multiplied by 0, which would leave a NaN.
        self.padding().map_or_else(|| z.shallow_clone(), |token| z.masked_fill(&xs.eq(token).unsqueeze(-1), 0.0))
    }
}

/// Gᵢ\[v\] = Σ δᵢₜ over the positions t of example i with token v; none for the padding token.
#[derive(Debug)]
struct Table {
    /// `[B, …]`
    tokens: Tensor,
    entries: i64,
    /// As tch's: negative for none.
    padding_idx: i64,
}

impl Table {
    /// i·V + token `[b, …]`: which entry of which example's gradient a position adds to.
    fn keys(&self, first: i64, delta: &Tensor) -> Result<Tensor> {
        let b = delta.size()[0];
        let tokens = self.tokens.f_narrow(0, first, b)?.f_totype(Kind::Int64)?;
        // Every example gets a table of its own, so that libtorch's sparse sum keeps examples apart.
        let starts = Tensor::f_arange(b, (Kind::Int64, tokens.device()))?.f_mul_scalar(self.entries)?;
        let mut column = vec![1; tokens.dim()];
        column[0] = b;
        Ok(tokens.f_add(&starts.f_reshape(column)?)?)
    }
}

impl Rule for Table {
    fn gradients(&self, first: i64, delta: &Tensor) -> Result<Tensor> {
        let size = delta.size();
        let (b, dim) = (size[0], size[size.len() - 1]);
        // Padding is -1 here, since the keys number other rows than tokens; its row is cleared below.
        let flat = Tensor::f_embedding_dense_backward(delta, &self.keys(first, delta)?, b * self.entries, -1, false)?;
        let gradients = flat.f_reshape([b, self.entries, dim])?;
        // Outside of the table, as tch's default of -1, there is no padding token.
        if (0..self.entries).contains(&self.padding_idx) {
            let _ = gradients.f_narrow(1, self.padding_idx, 1)?.f_zero_()?;
        }
        Ok(gradients)
    }

    /// Sums only over the (example, token) pairs that occur: memory for B·T rows, not for B·V.
    fn squares(&self, delta: &Tensor) -> Result<Option<Tensor>> {
        // An example may show a token at several positions, whose gradients add before they are squared.
        let (pairs, pair, _) = self.keys(0, delta)?.f_internal_unique2(true, true, false)?;
        let per_pair = Tensor::f_embedding_dense_backward(delta, &pair, pairs.size()[0], -1, false)?;
        let tokens = pairs.f_remainder(self.entries)?;
        let squares = per_pair.f_square()?;
        Ok(Some(Tensor::f_embedding_dense_backward(&squares, &tokens, self.entries, self.padding_idx, false)?))
    }
}
