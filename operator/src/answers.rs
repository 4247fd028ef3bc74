//! What an API server's refusals mean where they are no trouble.

use kube::{Error, Result};

/// `None`: there is no such object, or not even its kind is installed.
pub fn none_if_missing<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(error),
    }
}

/// Of a deletion, or of a change to an object that may be gone.
pub fn gone_is_fine<T>(result: Result<T>) -> Result<()> {
    none_if_missing(result).map(drop)
}

/// Of a creation that is repeated.
pub fn there_is_fine<T>(result: Result<T>) -> Result<()> {
    match result {
        Err(Error::Api(status)) if status.reason == "AlreadyExists" => Ok(()),
        other => other.map(drop),
    }
}
