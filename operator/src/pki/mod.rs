//! Certificates: an authority per cluster, leaf certificates per pair and site, renewal.
