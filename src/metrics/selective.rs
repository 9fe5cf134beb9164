//! Selective prediction: what is wrong among the answers that are given, when the least confident are withheld.

use super::detection::auroc;
use super::inputs::{check, scores, top};
use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Withholds answers by the confidence pₙ(ĉₙ): [`RiskCoverage`].
///
/// # Errors
/// See the [module](crate::metrics#errors).
pub fn selective(probs: &Tensor, labels: &Tensor) -> Result<RiskCoverage> {
    let (p, y) = check(probs, labels)?;
    Ok(RiskCoverage::new(p.rows().zip(&y).map(|(row, &y)| (top(row).1, top(row).0 != y)).collect()))
}

/// Withholds answers by any score of confidence `[N]`, high for the answers to keep; `correct` is `[N]` of kind Bool.
///
/// For instance the negative [`entropy`](crate::metrics::entropy), or the negative mutual information of a posterior.
///
/// # Errors
/// [`Error::Metric`] for other shapes or kinds, no examples, or a score that is NaN.
pub fn selective_by(confidence: &Tensor, correct: &Tensor) -> Result<RiskCoverage> {
    let confidence = scores("confidence", confidence)?;
    let n = confidence.len();
    if !correct.defined() || correct.kind() != Kind::Bool || correct.size() != [n as i64] {
        let is =
            if correct.defined() { format!("{:?} {:?}", correct.kind(), correct.size()) } else { "undefined".into() };
        return Err(Error::Metric(format!("correct is {is}: expected Bool [{n}] to match confidence")));
    }
    let correct: Vec<bool> = Vec::try_from(&correct.f_to_device(Device::Cpu)?.f_contiguous()?)?;
    Ok(RiskCoverage::new(confidence.into_iter().zip(correct.into_iter().map(|right| !right)).collect()))
}

/// Errors among the k most confident answers, E_k for k = 0, …, N. Comes from [`selective`] or [`selective_by`].
///
/// Equal confidences have no order: E_k is the expected value over all of them, and so are the areas.
#[derive(Debug, Clone, PartialEq)]
pub struct RiskCoverage {
    /// E_0 = 0, …, E_N.
    errors: Vec<f64>,
    /// Confidences of the wrong answers and of the right ones.
    wrong: Vec<f64>,
    right: Vec<f64>,
}

impl RiskCoverage {
    /// Confidences, and whether the answer is wrong.
    fn new(mut answers: Vec<(f64, bool)>) -> Self {
        answers.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        let mut errors = vec![0.0];
        let mut before = 0_usize;
        for tied in answers.chunk_by(|a, b| a.0 == b.0) {
            let wrong = tied.iter().filter(|a| a.1).count();
            // Wrong answers among the first j of them, on average over their orders.
            errors.extend((1..=tied.len()).map(|j| before as f64 + (j * wrong) as f64 / tied.len() as f64));
            before += wrong;
        }
        let of = |wrong: bool| answers.iter().filter(|a| a.1 == wrong).map(|a| a.0).collect();
        RiskCoverage { errors, wrong: of(true), right: of(false) }
    }

    /// N
    pub fn examples(&self) -> usize {
        self.errors.len() - 1
    }

    /// Coverage k/N and risk E_k/k for k = 1, …, N: what is drawn.
    pub fn curve(&self) -> Vec<(f64, f64)> {
        let n = self.examples() as f64;
        (1..self.errors.len()).map(|k| (k as f64 / n, self.errors[k] / k as f64)).collect()
    }

    /// Area under the risk-coverage curve, `(1/N) Σ_k E_k/k` (Geifman et al. 2019): 0 if all answers are right, 1 if
    /// all are wrong.
    pub fn aurc(&self) -> f64 {
        self.curve().iter().map(|(_, risk)| risk).sum::<f64>() / self.examples() as f64
    }

    /// The least that [`aurc`](Self::aurc) can be with as many errors: all of them last. It tends to
    /// r + (1-r) ln(1-r) for many examples with the error rate r.
    pub fn oracle(&self) -> f64 {
        let (n, right) = (self.examples(), self.right.len());
        (1..=n).map(|k| k.saturating_sub(right) as f64 / k as f64).sum::<f64>() / n as f64
    }

    /// [`aurc`](Self::aurc) less its [`oracle`](Self::oracle): what the order of the confidences costs; 0 is best.
    pub fn excess(&self) -> f64 {
        self.aurc() - self.oracle()
    }

    /// Area under the generalized risk-coverage curve, E_k/N over k/N by trapezoids from 0 (Traub et al. 2024,
    /// *Overcoming Common Flaws in the Evaluation of Selective Classification Systems*): the mean risk of an error that
    /// is not noticed. It is a r (1 - [`auroc`](Self::auroc)) + r²/2 with the error rate r = 1 - a: 0 if all answers
    /// are right, ½ if all are wrong.
    pub fn augrc(&self) -> f64 {
        let n = self.examples() as f64;
        self.errors.windows(2).map(|e| f64::midpoint(e[0], e[1])).sum::<f64>() / (n * n)
    }

    /// P(a right answer is more confident than a wrong one), ties ½: how well the confidence tells them apart,
    /// whatever the accuracy.
    ///
    /// # Errors
    /// [`Error::Metric`] if all answers are right, or all wrong: then there is nothing to tell apart.
    pub fn auroc(&self) -> Result<f64> {
        let n = self.examples();
        if self.wrong.is_empty() || self.right.is_empty() {
            let what = if self.wrong.is_empty() { "right" } else { "wrong" };
            return Err(Error::Metric(format!(
                "all {n} answers are {what}: expected some of either, which a confidence could tell apart"
            )));
        }
        auroc(&Tensor::from_slice(&self.wrong), &Tensor::from_slice(&self.right))
    }
}
