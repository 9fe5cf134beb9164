//! A table of methods that learn the same tasks one after the other.

use serde_json::{Value, json};
use tch_blr_examples::Outcome;
use tch_blr_examples::tables::{Figure, Job, Section, mean_and_sd, plus_minus};
use tch_blr_examples::tasks::{Method, Network, Task, Training, learn};

/// A method with the settings it is run with.
pub struct Row {
    pub name: &'static str,
    pub settings: &'static str,
    /// Final average accuracy in percent.
    pub published: Option<f64>,
    pub method: Method,
    pub training: Training,
    /// Its network.
    pub net: fn() -> Network,
}

impl Row {
    /// Without a published number.
    pub const fn new(
        name: &'static str,
        settings: &'static str,
        method: Method,
        training: Training,
        net: fn() -> Network,
    ) -> Row {
        Row { name, settings, published: None, method, training, net }
    }

    pub const fn published(self, percent: f64) -> Row {
        Row { published: Some(percent), ..self }
    }
}

/// Trains one row with one seed.
pub fn run(row: &Row, tasks: &[Task], seed: u64) -> Outcome<Value> {
    tch::manual_seed(seed as i64);
    let net = (row.net)();
    let learned = learn(&format!("{}, seed {seed}", row.name), &net, tasks, row.method, row.training, seed, |_, _| ())?;
    let r = &learned.accuracies;
    Ok(json!({
        "average": r.average()?, "backward_transfer": r.backward_transfer()?, "forgetting": r.forgetting()?,
        "learning_accuracy": r.learning_accuracy()?, "seconds_per_task": learned.seconds_per_task,
        "accuracies": serde_json::to_value(r)?,
    }))
}

/// Rows and figures of a table, with so many seeds.
pub fn rows(job: &Job, rows: &[Row], tasks: &[Task], seeds: u64) -> Outcome<(Vec<Vec<String>>, Vec<Figure>)> {
    let (mut cells, mut figures) = (Vec::new(), Vec::new());
    for row in rows {
        let training = Training { epochs: job.epochs(row.training.epochs), ..row.training };
        let row = Row { training, ..*row };
        let mut runs = Vec::new();
        for seed in 0..seeds {
            let key = format!("{}-{}-epochs-seed-{seed}", row.name, training.epochs);
            runs.push(job.once(&key, || run(&row, tasks, seed))?);
        }
        let all = |metric: &str| mean_and_sd(&runs.iter().filter_map(|run| run[metric].as_f64()).collect::<Vec<_>>());
        let percent = |metric: &str| {
            let (mean, sd) = all(metric);
            (100.0 * mean, sd.map(|sd| 100.0 * sd))
        };
        let (seconds, _) = all("seconds_per_task");
        let (ours, sd) = percent("average");
        let mut line = vec![row.name.to_owned(), plus_minus((ours, sd), 2)];
        line.push(row.published.map_or_else(String::new, |p| p.to_string()));
        let rest = ["backward_transfer", "forgetting", "learning_accuracy"];
        line.extend(rest.map(|metric| plus_minus(percent(metric), 2)));
        line.extend([format!("{seconds:.1}"), row.settings.to_owned()]);
        cells.push(line);
        let seconds = Some(seconds * tasks.len() as f64);
        figures.push(Figure { row: row.name.to_owned(), published: row.published, ours, sd, seeds, seconds });
    }
    Ok((cells, figures))
}

/// A section with the columns of [`rows`].
pub fn section(title: &str, text: &str, (rows, figures): (Vec<Vec<String>>, Vec<Figure>)) -> Section {
    let header = [
        "",
        "average accuracy (%)",
        "published",
        "backward transfer",
        "forgetting",
        "learning accuracy",
        "seconds per task",
        "settings",
    ];
    let text = format!("{text} Seconds are of one thread, beside whatever else the machine had to do.");
    Section { title: title.to_owned(), text, header: header.map(str::to_owned).into(), rows, figures }
}
