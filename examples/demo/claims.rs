//! What the demo is there to show, as numbers that must be reached.

use tch_blr_examples::Outcome;
use tch_blr_examples::tables::mean_and_sd;

/// A difference between means over the seeds. What must be reached is about half of what one machine has measured, so that
/// another one's rounding does not fail the demo, and an effect that is gone does.
pub struct Claim {
    what: String,
    unit: &'static str,
    measured: f64,
    at_least: f64,
}

impl Claim {
    /// By how many percent of `higher` `lower` is below it.
    pub fn below(what: String, lower: &[f64], higher: &[f64], at_least: f64) -> Claim {
        let [lower, higher] = [lower, higher].map(|values| mean_and_sd(values).0);
        Claim { what, unit: "%", measured: 100.0 * (1.0 - lower / higher), at_least }
    }

    /// By how many points the accuracies `higher` are above those of `lower`.
    pub fn above(what: String, higher: &[f64], lower: &[f64], at_least: f64) -> Claim {
        let [lower, higher] = [lower, higher].map(|values| mean_and_sd(values).0);
        Claim { what, unit: "points", measured: 100.0 * (higher - lower), at_least }
    }
}

/// # Errors
/// A line with each claim that does not hold.
pub fn check(claims: &[Claim]) -> Outcome {
    println!("\nWhat this shows (the demo fails below the number in brackets):");
    let mut failed = Vec::new();
    for Claim { what, unit, measured, at_least } in claims {
        println!("  {measured:>5.1} {unit:<6} [{at_least:>2}]  {what}");
        // A NaN is not enough, either.
        if measured.is_nan() || measured < at_least {
            failed.push(format!("{what} by {measured:.1} {unit}: expected at least {at_least}"));
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ").into()) }
}
