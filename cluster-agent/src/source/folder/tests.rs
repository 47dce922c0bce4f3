use std::os::unix::fs::PermissionsExt as _;

use super::*;

const CART: &str =
    "apiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\nspec: {ports: [{port: 80}]}\n";
const WEB: &str =
    "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {ports: [{port: 80}]}\n";
const BROKEN: &str =
    "apiVersion: v1\nkind: Service\nmetadata: {name: cart, namespace: shop}\nspec: {ports: [{port: 80000}]}\n";

/// A folder of its own, and a clock that is always late enough for files to count as settled.
struct Fixture {
    root: tempfile::TempDir,
    folder: Folder,
}

impl Fixture {
    fn new(files: &[(&str, &str)]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("manifests");
        fs::create_dir(&path).unwrap();
        let mut fixture = Self { root, folder: Folder::new(path, Saved::default()) };
        for (name, text) in files {
            fixture.write(name, text);
        }
        fixture.scan();
        fixture
    }

    fn path(&self) -> PathBuf {
        self.root.path().join("manifests")
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path().join(name), text).unwrap();
    }

    fn scan(&mut self) -> bool {
        self.folder.scan(SystemTime::now())
    }

    fn objects(&self) -> Vec<String> {
        let files = self.folder.manifests().files;
        files.values().flat_map(|objects| objects.iter().map(|o| o.reference().to_string())).collect()
    }

    fn problems(&self) -> Vec<Problem> {
        self.folder.manifests().problems
    }

    fn restarted(&self) -> Folder {
        Folder::new(self.path(), self.folder.saved())
    }
}

#[test]
fn a_bad_file_keeps_its_last_good_objects_and_names_file_line_and_field() {
    let mut f = Fixture::new(&[("cart.yaml", CART), ("web.yaml", WEB)]);
    f.write("cart.yaml", BROKEN);
    assert!(f.scan());
    assert_eq!(f.objects(), ["Service shop/cart", "Service shop/web"]);
    let [p] = f.problems().try_into().unwrap();
    assert!(p.at.starts_with("cart.yaml:"), "{p:?}");
    assert!(p.field.contains("port"), "{p:?}");
    f.write("cart.yaml", CART);
    assert!(f.scan());
    assert_eq!(f.problems(), []);
}

#[test]
fn garbage_keeps_everything_the_file_held() {
    let mut f = Fixture::new(&[("all.yaml", &format!("{CART}---\n{WEB}"))]);
    f.write("all.yaml", "{{{ not yaml");
    f.scan();
    assert_eq!(f.objects().len(), 2);
    assert_eq!(f.problems().len(), 1);
}

#[test]
fn good_documents_of_a_bad_file_count() {
    let mut f = Fixture::new(&[("all.yaml", CART)]);
    f.write("all.yaml", &format!("{BROKEN}---\n{WEB}"));
    f.scan();
    let mut objects = f.objects();
    objects.sort();
    assert_eq!(objects, ["Service shop/cart", "Service shop/web"]);
}

#[test]
fn an_object_removed_from_a_good_file_is_gone() {
    let mut f = Fixture::new(&[("all.yaml", &format!("{CART}---\n{WEB}"))]);
    f.write("all.yaml", WEB);
    f.scan();
    assert_eq!(f.objects(), ["Service shop/web"]);
}

#[test]
fn a_deleted_file_is_a_deletion() {
    let mut f = Fixture::new(&[("cart.yaml", CART), ("web.yaml", WEB)]);
    fs::remove_file(f.path().join("cart.yaml")).unwrap();
    assert!(f.scan());
    assert_eq!(f.objects(), ["Service shop/web"]);
    fs::remove_file(f.path().join("web.yaml")).unwrap();
    f.scan();
    assert_eq!(f.objects(), [""; 0]);
    assert_eq!(f.problems(), []);
}

#[test]
fn a_vanished_folder_keeps_everything_and_is_reported() {
    let mut f = Fixture::new(&[("cart.yaml", CART)]);
    fs::rename(f.path(), f.root.path().join("elsewhere")).unwrap();
    assert!(f.scan());
    assert_eq!(f.objects(), ["Service shop/cart"]);
    assert_eq!(f.problems().len(), 1);
    assert!(f.folder.manifests().synced);
    fs::rename(f.root.path().join("elsewhere"), f.path()).unwrap();
    f.scan();
    assert_eq!(f.problems(), []);
    assert_eq!(f.objects(), ["Service shop/cart"]);
}

#[test]
fn an_unmounted_folder_looks_empty_and_keeps_everything() {
    let mut f = Fixture::new(&[("cart.yaml", CART)]);
    fs::rename(f.path(), f.root.path().join("elsewhere")).unwrap();
    fs::create_dir(f.path()).unwrap();
    f.scan();
    assert_eq!(f.objects(), ["Service shop/cart"]);
    assert_eq!(f.problems().len(), 1);
    // Anything in it makes it the folder.
    f.write("web.yaml", WEB);
    f.scan();
    assert_eq!(f.objects(), ["Service shop/web"]);
    assert_eq!(f.problems(), []);
}

#[test]
fn an_emptied_file_keeps_its_objects() {
    let mut f = Fixture::new(&[("cart.yaml", CART)]);
    f.write("cart.yaml", "");
    f.scan();
    assert_eq!(f.objects(), ["Service shop/cart"]);
    assert_eq!(f.problems().len(), 1);
}

#[test]
fn an_unreadable_file_keeps_its_objects() {
    let mut f = Fixture::new(&[("cart.yaml", CART)]);
    let path = f.path().join("cart.yaml");
    // A folder in its place cannot be read as a file, whoever asks (root reads everything else).
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    f.scan();
    assert_eq!(f.objects(), ["Service shop/cart"]);
    assert_eq!(f.problems().len(), 1);
    fs::remove_dir(&path).unwrap();
    f.write("cart.yaml", CART);
    f.scan();
    assert_eq!(f.problems(), []);
}

#[test]
fn a_missing_folder_is_reported_and_read_when_it_appears() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("manifests");
    let mut folder = Folder::new(path.clone(), Saved::default());
    assert!(folder.scan(SystemTime::now()));
    assert!(!folder.manifests().synced);
    assert_eq!(folder.manifests().problems.len(), 1);
    fs::create_dir(&path).unwrap();
    fs::write(path.join("cart.yaml"), CART).unwrap();
    assert!(folder.scan(SystemTime::now()));
    assert!(folder.manifests().synced);
    assert_eq!(folder.manifests().files.len(), 1);
}

#[test]
fn a_restart_without_the_folder_starts_from_the_last_good_texts() {
    let mut f = Fixture::new(&[("cart.yaml", CART)]);
    f.write("cart.yaml", BROKEN);
    f.scan();
    fs::rename(f.path(), f.root.path().join("elsewhere")).unwrap();
    let mut folder = f.restarted();
    folder.scan(SystemTime::now());
    let manifests = folder.manifests();
    assert!(!manifests.synced);
    assert_eq!(manifests.files["cart.yaml"].len(), 1);
}

#[test]
fn a_restart_sees_what_was_deleted_meanwhile() {
    let f = Fixture::new(&[("cart.yaml", CART), ("web.yaml", WEB)]);
    fs::remove_file(f.path().join("cart.yaml")).unwrap();
    let mut folder = f.restarted();
    folder.scan(SystemTime::now());
    assert_eq!(folder.manifests().files.keys().collect::<Vec<_>>(), ["web.yaml"]);
}

#[test]
fn other_files_are_not_manifests() {
    let mut f = Fixture::new(&[("cart.yaml", CART)]);
    f.write(".cart.yaml.swp", "x");
    f.write("README.md", "x");
    f.write("cart.yaml~", "x");
    assert!(!f.scan());
    assert_eq!(f.problems(), []);
}

#[test]
fn a_change_of_the_same_size_within_a_clock_tick_is_seen() {
    let mut f = Fixture::new(&[("a.yaml", CART)]);
    f.write("a.yaml", &CART.replace("cart", "tarc"));
    assert!(f.scan());
    assert_eq!(f.objects(), ["Service shop/tarc"]);
}
