//! Weights with one prior precision p, whose curvature H is known by its eigenvalues l: what S = sH + p needs.

use crate::Result;
use tch::{Kind, Tensor};

/// An orthonormal basis in which H is diagonal.
#[derive(Debug)]
pub(super) enum Basis {
    /// That of the weights.
    Weights,
    /// U_G ⊗ U_A of a weight with its bias, a matrix `[out, in]`, and the eigenvalues of both factors.
    Kronecker { left: Tensor, right: Tensor, g: Tensor, a: Tensor },
    /// Eigenvectors `[P, K]`; H vanishes on what is orthogonal to them.
    Vectors(Tensor),
}

#[derive(Debug)]
pub(super) struct Block {
    /// Of its parameters.
    pub names: Vec<String>,
    /// `[P]` places of its weights among all.
    pub places: Tensor,
    pub basis: Basis,
    /// l ≥ 0 `[K]`, in f64; K < P only of eigenvectors, where the others are 0.
    values: Tensor,
    /// m - m₀ `[P]`
    offset: Tensor,
    /// ‖m - m₀‖²
    scatter: f64,
    /// Gradient of the loss of the data `[P]`.
    gradient: Option<Tensor>,
    /// p
    pub precision: f64,
}

fn number(t: &Tensor) -> Result<f64> {
    Ok(t.f_sum(Kind::Double)?.f_double_value(&[])?)
}

impl Block {
    pub fn new(names: Vec<String>, places: Tensor, basis: Basis, values: Tensor, precision: f64) -> Result<Self> {
        let offset = Tensor::f_zeros(places.size(), (Kind::Double, places.device()))?;
        Ok(Block { names, places, basis, values, offset, scatter: 0.0, gradient: None, precision })
    }

    /// From m - m₀ of all weights.
    pub fn set_offset(&mut self, all: &Tensor) -> Result<()> {
        self.offset = all.f_index_select(0, &self.places)?;
        self.scatter = number(&self.offset.f_square()?)?;
        Ok(())
    }

    /// From the gradient with respect to all weights.
    pub fn set_gradient(&mut self, all: &Tensor) -> Result<()> {
        self.gradient = Some(all.f_index_select(0, &self.places)?);
        Ok(())
    }

    /// m - m₀
    pub fn offset(&self) -> &Tensor {
        &self.offset
    }

    /// P
    pub fn weights(&self) -> i64 {
        self.places.size()[0]
    }

    /// ‖m - m₀‖²
    pub fn scatter(&self) -> f64 {
        self.scatter
    }

    /// s·l + p `[K]`
    pub fn precisions(&self, scale: f64) -> Tensor {
        &self.values * scale + self.precision
    }

    /// ln det S - P ln p ≥ 0
    pub fn log_det(&self, scale: f64) -> Result<f64> {
        number(&(&self.values * (scale / self.precision)).f_log1p()?)
    }

    /// The same of (A + √p) ⊗ (sG + √p) where sH is A ⊗ sG.
    pub fn damped_log_det(&self, scale: f64) -> Result<f64> {
        let Basis::Kronecker { g, a, .. } = &self.basis else { return self.log_det(scale) };
        // ln(x + √p) = ln(1 + x/√p) + ½ ln p, with as many terms of each as there are pairs.
        let part = |x: &Tensor| number(&(x / self.precision.sqrt()).f_log1p()?);
        Ok(part(a)? * g.numel() as f64 + part(&(g * scale))? * a.numel() as f64)
    }

    /// γ = tr(sH S⁻¹) = P - p tr S⁻¹: how many weights the data determine.
    pub fn effective(&self, scale: f64) -> Result<f64> {
        number(&(&self.values * scale / self.precisions(scale)))
    }

    /// Rows X `[n, P]` of the block's weights as Y with YYᵀ = X S⁻¹ Xᵀ.
    pub fn white(&self, x: &Tensor, scale: f64) -> Result<Tensor> {
        let root = self.precisions(scale).f_sqrt()?;
        Ok(match &self.basis {
            Basis::Weights => x / root,
            Basis::Kronecker { left, right, g, a } => {
                let n = x.size()[0];
                let x = x.f_reshape([n, g.numel() as i64, a.numel() as i64])?;
                left.f_tr()?.f_matmul(&x.f_matmul(right)?)?.f_reshape([n, -1])? / root
            }
            Basis::Vectors(u) => {
                let y = x.f_matmul(u)?;
                let inside = &y / root;
                if u.size()[1] == u.size()[0] {
                    return Ok(inside);
                }
                // What has no curvature has the prior's precision.
                let outside = (x - y.f_matmul(&u.f_tr()?)?) / self.precision.sqrt();
                Tensor::f_cat(&[inside, outside], 1)?
            }
        })
    }

    /// ½ gᵀS⁻¹g with g = s∇ℓ + p(m - m₀); `None` if the gradient is unknown.
    pub fn decrement(&self, scale: f64) -> Result<Option<f64>> {
        let Some(gradient) = &self.gradient else { return Ok(None) };
        let g = gradient * scale + &self.offset * self.precision;
        Ok(Some(0.5 * number(&self.white(&g.f_unsqueeze(0)?, scale)?.f_square()?)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn the_determinants_of_a_layer_are_those_of_the_reference() {
        let t = |x: [f64; 4]| Tensor::from_slice(&x).reshape([2, 2]);
        let (a, g) = (t([2.0, 0.5, 0.5, 1.0]), t([1.0, 0.2, 0.2, 0.5]));
        let ((g_values, left), (a_values, right)) = (g.linalg_eigh("L"), a.linalg_eigh("L"));
        let dense = g.kron(&a);
        let places = || Tensor::arange(4, (Kind::Int64, Device::Cpu));
        let values = g_values.outer(&a_values).reshape([-1]);
        let kronecker = Basis::Kronecker { left, right, g: g_values, a: a_values };
        let kronecker = Block::new(vec!["w".into()], places(), kronecker, values, 0.3).unwrap();
        let diagonal = Block::new(vec!["w".into()], places(), Basis::Weights, dense.diag(0), 0.3).unwrap();
        let log_det = |block: &Block| block.log_det(1.0).unwrap() + 4.0 * 0.3f64.ln();
        let close = |x: f64, y: f64| assert!((x - y).abs() < 1e-13, "{x} {y}");
        close(log_det(&kronecker), 0.894_637_994_178_7);
        close(
            log_det(&kronecker),
            (&dense + Tensor::eye(4, (Kind::Double, Device::Cpu)) * 0.3).logdet().double_value(&[]),
        );
        close(log_det(&diagonal), 1.134_494_100_555_876_4);
        close(kronecker.damped_log_det(1.0).unwrap() + 4.0 * 0.3f64.ln(), 3.529_822_621_175_346);
    }
}
