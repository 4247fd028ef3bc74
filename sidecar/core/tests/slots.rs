//! The two-slot record: replaced atomically whatever a loss of power leaves of the write.

use watari_core::{
    slots::{SLOT_BYTES, SLOT_PAYLOAD_BYTES_MAX, SlotError, SlotFile},
    storage::{
        Storage, StorageError,
        sim::{SimMedium, SimRng, SimStorage, Survival},
    },
};

const MAGIC: [u8; 8] = *b"WATTESTS";

fn open(storage: &SimStorage) -> Result<Option<(SlotFile, Vec<u8>)>, SlotError> {
    Ok(SlotFile::open(storage, "record", MAGIC, 1)?.map(|(file, payload)| (file, payload.bytes)))
}

fn payload(number: u64) -> Vec<u8> {
    let mut bytes = vec![number as u8; 3000];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

#[test]
fn a_record_is_read_back_after_each_replacement() {
    let medium = SimMedium::new();
    let mut storage = medium.folder("f");
    assert_eq!(open(&storage), Ok(None));
    let mut file = SlotFile::create(&mut storage, "record", MAGIC, 1, b"first").expect("create");
    for number in 0..5 {
        file.write(&mut storage, &payload(number)).expect("write");
        let (again, bytes) = open(&storage).expect("open").expect("a record");
        assert_eq!((bytes, again.sequence()), (payload(number), number + 3));
    }
}

#[test]
fn power_lost_at_any_operation_leaves_the_old_record_or_the_new_one() {
    let mut rng = SimRng(7);
    for survival in [Survival::Nothing, Survival::Everything, Survival::Writes, Survival::Sectors] {
        for at in 1..=15 {
            for _ in 0..20 {
                let medium = SimMedium::new();
                let mut storage = medium.folder("f");
                medium.power_off_at(Some(at));
                let mut acknowledged = None;
                let mut attempted = 0;
                if let Ok(mut file) = SlotFile::create(&mut storage, "record", MAGIC, 1, &payload(0)) {
                    acknowledged = Some(0);
                    while attempted < 5 && file.write(&mut storage, &payload(attempted + 1)).is_ok() {
                        attempted += 1;
                        acknowledged = Some(attempted);
                    }
                }
                medium.lose_power(survival, &mut rng);
                let found = open(&storage).expect("never damaged").map(|(_, bytes)| bytes);
                let old = acknowledged.map(payload);
                let new = Some(payload(acknowledged.map_or(0, |number| number + 1)));
                assert!(found == old || found == new, "operation {at}, {survival:?}");
                // And it can be written again.
                match SlotFile::open(&storage, "record", MAGIC, 1).expect("open") {
                    Some((mut file, _)) => file.write(&mut storage, b"again").expect("write"),
                    None => drop(SlotFile::create(&mut storage, "record", MAGIC, 1, b"again").expect("create")),
                }
                assert_eq!(open(&storage).expect("open").expect("a record").1, b"again");
            }
        }
    }
}

#[test]
fn a_newer_version_is_refused_even_in_the_older_slot() {
    for writes in 0..2 {
        let medium = SimMedium::new();
        let mut storage = medium.folder("f");
        let mut newer = SlotFile::create(&mut storage, "record", MAGIC, 2, b"new").expect("create");
        newer.write(&mut storage, b"new").expect("write");
        for _ in 0..writes {
            newer.write(&mut storage, b"new").expect("write");
        }
        let before = medium.operations();
        let refused = SlotError::NewerVersion { file: "record".into(), found: 2, supported: 1 };
        assert_eq!(open(&storage), Err(refused));
        assert_eq!(medium.operations(), before, "nothing was touched");
    }
}

#[test]
fn another_kind_of_file_is_refused_and_damage_in_both_slots_is_told() {
    let medium = SimMedium::new();
    let mut storage = medium.folder("f");
    SlotFile::create(&mut storage, "record", *b"OTHERONE", 1, b"x").expect("create");
    assert!(matches!(open(&storage), Err(SlotError::Foreign { found, .. }) if &found == b"OTHERONE"));
    let mut storage = medium.folder("g");
    SlotFile::create(&mut storage, "record", MAGIC, 1, b"x").expect("create");
    medium.rot("g", "record", 40, 0);
    assert!(open(&storage).expect("one slot is good").is_some());
    medium.rot("g", "record", SLOT_BYTES as u64 + 40, 0);
    assert_eq!(open(&storage), Err(SlotError::Corrupt { file: "record".into() }));
    storage.truncate("record", 100).expect("truncate");
    assert_eq!(open(&storage), Ok(None), "a torn first slot and a blank second one: creation was interrupted");
}

#[test]
fn a_failed_sync_closes_the_file_to_writing() {
    let medium = SimMedium::new();
    let mut storage = medium.folder("f");
    let mut file = SlotFile::create(&mut storage, "record", MAGIC, 1, b"old").expect("create");
    medium.fail_at(Some(medium.operations() + 2));
    assert!(matches!(file.write(&mut storage, b"new"), Err(SlotError::Storage(StorageError::Io(..)))));
    assert_eq!(file.write(&mut storage, b"new"), Err(SlotError::Poisoned { file: "record".into() }));
}

#[test]
fn a_payload_that_does_not_fit_is_refused() {
    let medium = SimMedium::new();
    let mut storage = medium.folder("f");
    let mut file = SlotFile::create(&mut storage, "record", MAGIC, 1, b"x").expect("create");
    file.write(&mut storage, &vec![1; SLOT_PAYLOAD_BYTES_MAX]).expect("the largest fits");
    let bytes = SLOT_PAYLOAD_BYTES_MAX + 1;
    assert_eq!(file.write(&mut storage, &vec![1; bytes]), Err(SlotError::TooLarge { bytes }));
}
