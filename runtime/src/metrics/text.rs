//! The text format: samples, gathered under the names of their metrics.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::printable::printable;

/// A metric: its name, its type and what it is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// What it says.
    pub help: &'static str,
}

/// The samples so far. Those of a metric have to stand together, in whatever order they come.
#[derive(Debug, Default)]
pub struct Text(BTreeMap<Metric, String>);

impl Text {
    /// Adds a sample.
    pub fn add(&mut self, metric: Metric, labels: &[(&str, &str)], value: f64) {
        self.add_as(metric, "", labels, value);
    }

    /// Adds a sample of a histogram, whose name has something added.
    pub fn add_as(&mut self, metric: Metric, suffix: &str, labels: &[(&str, &str)], value: f64) {
        let pairs: Vec<String> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let labels = if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) };
        let samples = self.0.entry(metric).or_default();
        // Writing to a string cannot fail.
        let _ = writeln!(samples, "{}{suffix}{labels} {value}", metric.name);
    }

    /// All of it.
    pub fn finish(self) -> String {
        let about = |metric: &Metric| {
            let Metric { name, kind, help } = metric;
            format!("# HELP {name} {help}\n# TYPE {name} {kind}\n")
        };
        self.0.iter().map(|(metric, samples)| about(metric) + samples).collect()
    }
}

/// The value of a label. Some come from machines, which are not to be believed.
fn escaped(value: &str) -> String {
    printable(value).replace('\\', "\\\\").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_stand_together_and_labels_are_escaped() {
        let a = Metric { name: "a_total", kind: "counter", help: "All a." };
        let b = Metric { name: "b", kind: "gauge", help: "B." };
        let mut text = Text::default();
        text.add(b, &[], 1.5);
        text.add(a, &[("id", "x\"y\\")], 1.0);
        text.add(b, &[("c", "d"), ("e", "f")], 18_446_744_073.0);
        let expected = "# HELP a_total All a.\n# TYPE a_total counter\na_total{id=\"x\\\"y\\\\\"} 1\n\
                        # HELP b B.\n# TYPE b gauge\nb 1.5\nb{c=\"d\",e=\"f\"} 18446744073\n";
        assert_eq!(text.finish(), expected);
    }
}
