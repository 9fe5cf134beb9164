//! What the demo says, as numbers that must hold.

use tch_blr_examples::Outcome;
use tch_blr_examples::tables::mean_and_sd;

/// A difference that the demo is there to show.
pub struct Claim {
    what: String,
    measured: f64,
    at_least: f64,
}

impl Claim {
    /// In the mean over the seeds, `lower` is below `higher` by this share of it.
    pub fn below(what: String, lower: &[f64], higher: &[f64], percent: f64) -> Claim {
        let [lower, higher] = [lower, higher].map(|values| mean_and_sd(values).0);
        Claim { what: format!("{what} by %"), measured: 100.0 * (1.0 - lower / higher), at_least: percent }
    }

    /// In the mean over the seeds, `higher` is above `lower` by so many points of accuracy.
    pub fn above(what: String, higher: &[f64], lower: &[f64], points: f64) -> Claim {
        let [lower, higher] = [lower, higher].map(|values| mean_and_sd(values).0);
        Claim { what: format!("{what} by points of accuracy"), measured: 100.0 * (higher - lower), at_least: points }
    }
}

/// # Errors
/// A line for each claim that does not hold.
pub fn check(claims: &[Claim]) -> Outcome {
    println!("\nWhat this shows, and how much of it must hold for the demo to succeed:");
    let mut failed = Vec::new();
    for Claim { what, measured, at_least } in claims {
        println!("  {what:<86} {measured:>5.1}  (at least {at_least})");
        // Written so that a NaN fails, too.
        if !(measured >= at_least) {
            failed.push(format!("{what}: {measured:.1}, expected at least {at_least}"));
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ").into()) }
}
