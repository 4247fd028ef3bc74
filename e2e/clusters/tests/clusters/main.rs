//! What runs on two clusters. `make e2e`; one behaviour per file, a namespace per test.

mod claims;
mod nodes;
mod resume;
mod scene;
mod wan;
