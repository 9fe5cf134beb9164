//! Weightings on a grid.

/// All α ≥ 0 with Σ α = 1 on a grid of 1/steps, in lexicographic order: the (steps+tasks-1 choose tasks-1) weightings
/// for which a user may want to see a merge before choosing one. Each α_k is a whole number divided by `steps`.
///
/// None for 0 tasks or 0 steps.
///
/// ```
/// use blr_merge::simplex;
/// assert!(simplex(2, 2).eq([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]));
/// assert_eq!((simplex(3, 10).count(), simplex(0, 10).count(), simplex(3, 0).count()), (66, 0, 0));
/// ```
pub fn simplex(tasks: usize, steps: usize) -> impl Iterator<Item = Vec<f64>> {
    let first = (tasks > 0 && steps > 0).then(|| {
        let mut counts = vec![0; tasks];
        counts[tasks - 1] = steps;
        counts
    });
    let counts = std::iter::successors(first, |counts| next(counts.clone()));
    counts.map(move |counts| counts.into_iter().map(|n| n as f64 / steps as f64).collect())
}

/// The counts of the same sum that are next in lexicographic order.
fn next(mut counts: Vec<usize>) -> Option<Vec<usize>> {
    // The last one that is not zero gives one to its left, and all else of it goes to the end.
    let last = counts.iter().rposition(|n| *n > 0)?;
    let rest = counts[last] - 1;
    *counts.get_mut(last.checked_sub(1)?)? += 1;
    counts[last] = 0;
    *counts.last_mut()? = rest;
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_weighting_once_in_order() {
        for (tasks, steps, count) in [(1, 1, 1), (1, 7, 1), (2, 10, 11), (3, 4, 15), (4, 5, 56), (5, 3, 35)] {
            let all: Vec<Vec<f64>> = simplex(tasks, steps).collect();
            assert_eq!(all.len(), count, "{tasks} {steps}");
            // Against the plain way: counting through all of the cube.
            let mut cube = Vec::new();
            for code in 0..(steps + 1).pow(tasks as u32) {
                let digit = |k: usize| code / (steps + 1).pow((tasks - 1 - k) as u32) % (steps + 1);
                let counts: Vec<usize> = (0..tasks).map(digit).collect();
                if counts.iter().sum::<usize>() == steps {
                    cube.push(counts.into_iter().map(|n| n as f64 / steps as f64).collect::<Vec<f64>>());
                }
            }
            assert_eq!(all, cube);
        }
        assert_eq!(simplex(0, 3).chain(simplex(3, 0)).count(), 0);
    }
}
