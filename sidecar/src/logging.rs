//! Logs: to standard error, as text or as one JSON object a line.
//!
//! Spans are printed with their fields, so that everything that belongs to one generation can be found by its number.

use tracing_subscriber::{EnvFilter, fmt::format::FmtSpan};

use crate::cli::LogFormat;

#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    #[error("`--log`: found {found:?}, expected a level or a filter such as `info,h2=warn`: {error}")]
    Filter { found: String, error: tracing_subscriber::filter::ParseError },
    #[error("logging was set up already")]
    Twice,
}

/// Sets up logging for the whole process; once.
pub fn init(filter: &str, format: LogFormat) -> Result<(), LoggingError> {
    let parsed =
        EnvFilter::try_new(filter).map_err(|error| LoggingError::Filter { found: filter.to_owned(), error })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        .with_span_events(FmtSpan::NONE)
        .with_target(true);
    let result = match format {
        LogFormat::Text => {
            let color = std::io::IsTerminal::is_terminal(&std::io::stderr());
            builder.with_ansi(color).try_init()
        }
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init(),
    };
    result.map_err(|_| LoggingError::Twice)
}
