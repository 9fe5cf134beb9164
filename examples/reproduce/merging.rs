//! The table of merging on USPS, beside the reference values.

use crate::d4::{self, Row};
use crate::report::{Figure, Job, Outcome, Section};
use std::path::Path;

pub fn table(_: &Job) -> Outcome<Section> {
    let data = std::env::var_os("TCH_BLR_DATA").ok_or("set TCH_BLR_DATA to the folder that has usps/")?;
    let published = [
        ("fine-tune on 4, 5", [81.12, f64::NAN, f64::NAN]),
        ("fine-tune on 6, 7", [86.05, f64::NAN, f64::NAN]),
        ("fine-tune on 8, 9", [87.39, f64::NAN, f64::NAN]),
        ("average", [89.39, 0.562, 476.0]),
        ("task arithmetic", [92.03, 0.292, 170.0]),
        ("Fisher average", [91.08, 0.501, 332.0]),
        ("gradient matching, diagonal", [91.98, 0.336, 153.0]),
        ("gradient matching, full", [93.17, 0.131, 19.3]),
        ("target", [93.32, 0.0, 0.0]),
    ];
    let (mut rows, mut figures) = (Vec::new(), Vec::new());
    for Row { scheme, accuracy, distance, gap } in d4::run(Path::new(&data))? {
        let reference = published.iter().find(|(name, _)| *name == scheme).map(|(_, values)| values);
        let mut cells = vec![scheme.clone()];
        for (i, (what, ours, digits)) in
            [("accuracy", accuracy, 2), ("distance", distance, 3), ("gap", gap, 1)].into_iter().enumerate()
        {
            let published = reference.map(|values| values[i]).filter(|v| v.is_finite());
            let beside = published.map(|v| format!(" ({v})")).unwrap_or_default();
            cells.push(format!("{ours:.digits$}{beside}"));
            let row = format!("{scheme}: {what}");
            figures.push(Figure { row, published, ours, sd: None, seeds: 1, seconds: None });
        }
        rows.push(cells);
    }
    Ok(Section {
        title: "Merging on USPS".to_owned(),
        text: "Logistic regression, odd against even digits: three fine-tunes of one base, merged, against the fine-tune on \
               all three. Everything is an exact optimum in f64; in brackets the reference values, computed by an \
               independent program. Distance: relative, to the target's weights; gap: joint loss beyond the target's."
            .to_owned(),
        header: ["scheme", "accuracy (%)", "distance", "gap (nats)"].map(str::to_owned).into(),
        rows,
        figures,
    })
}
