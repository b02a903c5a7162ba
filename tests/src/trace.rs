//! The steps that a document names as `` `file.rs::function` ``.

use std::path::Path;

/// Every step that `page` names, in its order.
pub fn steps(page: &str) -> Vec<(&str, &str)> {
    let code = page.split('`').skip(1).step_by(2);
    code.filter_map(|code| code.split_once("::")).filter(|(file, _)| file.ends_with(".rs")).collect()
}

/// Whether the file at `path` defines a function of this name.
pub fn defines(path: &Path, function: &str) -> bool {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let start = format!("fn {function}");
    text.match_indices(&start).any(|(at, _)| text[at + start.len()..].starts_with(['(', '<']))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The source tree, which the machine that runs this has.
    const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

    #[test]
    fn the_architecture_page_names_functions_that_exist() {
        let page = std::fs::read_to_string(Path::new(ROOT).join("ARCHITECTURE.md")).unwrap();
        let steps = steps(&page);
        assert!(steps.len() > 30, "the page has lost its traces: {steps:?}");
        for (file, function) in steps {
            assert!(defines(&Path::new(ROOT).join(file), function), "{file} has no function {function}");
        }
    }

    #[test]
    fn the_threat_model_names_tests_that_exist() {
        let page = std::fs::read_to_string(Path::new(ROOT).join("docs/threat-model.md")).unwrap();
        let shown = steps(&page);
        assert!(shown.len() > 30, "the page has lost its tests: {shown:?}");
        for (file, test) in shown {
            // A file without a directory is one of the end-to-end tests.
            let place = if file.contains('/') { "" } else { "tests/tests/e2e" };
            assert!(defines(&Path::new(ROOT).join(place).join(file), test), "{file} has no test {test}");
        }
    }

    #[test]
    fn steps_are_found_between_backticks() {
        assert_eq!(steps("see `a/b.rs::c`, `b.rs`, and `x::y`"), [("a/b.rs", "c")]);
    }

    #[test]
    fn a_longer_name_is_another_function() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "fn run_all() {}\npub fn take<T>(t: T) {}").unwrap();
        assert!(!defines(file.path(), "run"));
        assert!(defines(file.path(), "take"));
    }
}
