//! Admission: wiring of paired VMs, and refusal of a VM that is active elsewhere.
