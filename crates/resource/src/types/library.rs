//! Resource types in shared libraries, through the C interface of `include/csv_resource.h`: that file is the
//! documentation, and the structures here are its mirror. All `unsafe` of this crate is in this module.
//!
//! A library runs in the host's process and can do anything there. What is checked is what can be: version, size, that
//! every entry point is there, and bounds of what it lists. It is never unloaded, since its threads may run.

#![allow(unsafe_code, reason = "calls through the C interface of resource libraries")]

use crate::api::{Context, EventLevel, Failure, Form, Property, Resource, ResourceType, Spec, TypeInfo};
use serde_json::Value;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::path::Path;
use std::time::Duration;

/// `CSV_RESOURCE_ABI`.
const ABI: u32 = 1;
/// Properties of one type.
const PROPERTIES_MAX: usize = 256;
/// Bytes for a reason.
const WHY_BYTES: usize = 4096;
/// Bytes for an answer of `control`.
const ANSWER_BYTES: usize = 256 << 10;

type Entry = unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> c_int;
type Open =
    unsafe extern "C" fn(*const RawHost, *const RawSpec, *mut *mut c_void, *mut c_char, usize) -> c_int;
type Control = unsafe extern "C" fn(
    *mut c_void,
    *const c_char,
    *const c_char,
    *mut c_char,
    usize,
    *mut c_char,
    usize,
) -> c_int;
type Get = unsafe extern "C" fn(u32) -> *const RawType;

/// `csv_property`.
#[repr(C)]
struct RawProperty {
    name: *const c_char,
    help: *const c_char,
    fallback: *const c_char,
    required: c_int,
}

/// `csv_resource_type`.
#[repr(C)]
struct RawType {
    abi: u32,
    size: u32,
    name: *const c_char,
    help: *const c_char,
    properties: *const RawProperty,
    properties_count: usize,
    looks_alive_ms: u32,
    is_alive_ms: u32,
    open: Option<Open>,
    online: Option<Entry>,
    offline: Option<Entry>,
    terminate: Option<Entry>,
    looks_alive: Option<Entry>,
    is_alive: Option<Entry>,
    adopt: Option<Entry>,
    control: Option<Control>,
    close: Option<unsafe extern "C" fn(*mut c_void)>,
}

/// `csv_value`.
#[repr(C)]
struct RawValue {
    name: *const c_char,
    value: *const c_char,
}

/// `csv_spec`.
#[repr(C)]
struct RawSpec {
    abi: u32,
    size: u32,
    name: *const c_char,
    group: *const c_char,
    node: *const c_char,
    run_dir: *const c_char,
    state_dir: *const c_char,
    generation: u64,
    properties: *const RawValue,
    properties_count: usize,
    json: *const c_char,
}

/// `csv_host`.
#[repr(C)]
struct RawHost {
    abi: u32,
    size: u32,
    host: *const Context,
    progress: unsafe extern "C" fn(*const Context, *const c_char),
    cancelled: unsafe extern "C" fn(*const Context) -> c_int,
    report: unsafe extern "C" fn(*const Context, *const c_char),
    event: unsafe extern "C" fn(*const Context, c_int, *const c_char),
    save: unsafe extern "C" fn(*const Context, *const c_char),
    saved: unsafe extern "C" fn(*const Context, *mut c_char, usize) -> usize,
}

/// Entry points that every type has.
#[derive(Clone, Copy)]
struct Entries {
    open: Open,
    online: Entry,
    offline: Entry,
    terminate: Entry,
    looks_alive: Entry,
    is_alive: Entry,
    adopt: Option<Entry>,
    control: Option<Control>,
    close: unsafe extern "C" fn(*mut c_void),
}

/// A type from a library.
struct LibraryType {
    info: TypeInfo,
    entries: Entries,
}

/// Loads a library and takes its type.
///
/// # Errors
/// It cannot be loaded, or is none for this version, or has another type.
pub(super) fn load(kind: &str, path: &Path) -> Result<Box<dyn ResourceType>, String> {
    let wrong = |what: &str| format!("resource library {}: {what}", path.display());
    if !path.is_absolute() {
        return Err(wrong("its path has to be absolute"));
    }
    // SAFETY: the administrator named this library to be run as part of the host; its initialisers are its business.
    let library = unsafe { libloading::Library::new(path) }.map_err(|e| wrong(&e.to_string()))?;
    // Never unloaded; loading it again gives the same one.
    let library: &'static libloading::Library = Box::leak(Box::new(library));
    // SAFETY: a library that exports this name promises this type, by csv_resource.h.
    let get: libloading::Symbol<'_, Get> = unsafe { library.get(b"csv_resource_type_get\0") }
        .map_err(|_| wrong("it does not export csv_resource_type_get; see csv_resource.h"))?;
    // SAFETY: as above; it takes a number.
    let raw = unsafe { get(ABI) };
    if raw.is_null() {
        return Err(wrong(&format!("it does not know version {ABI} of the interface")));
    }
    // SAFETY: not null; every version of the structure begins with these two numbers.
    let (abi, size) = unsafe { ((*raw).abi, (*raw).size) };
    let expected = std::mem::size_of::<RawType>();
    if abi != ABI || usize::try_from(size).unwrap_or(0) < expected {
        return Err(wrong(&format!("version {abi}, {size} bytes, and not version {ABI}, {expected} bytes")));
    }
    // SAFETY: version and size say that this is one, and by csv_resource.h it lives as long as the process.
    let raw: &'static RawType = unsafe { &*raw };
    let entries = entries(raw).ok_or_else(|| wrong("an entry point is missing"))?;
    let info = describe(raw).map_err(|e| wrong(&e))?;
    if info.name != kind {
        return Err(wrong(&format!("its type is {}, not {kind}", info.name)));
    }
    Ok(Box::new(LibraryType { info, entries }))
}

fn entries(raw: &RawType) -> Option<Entries> {
    Some(Entries {
        open: raw.open?,
        online: raw.online?,
        offline: raw.offline?,
        terminate: raw.terminate?,
        looks_alive: raw.looks_alive?,
        is_alive: raw.is_alive?,
        adopt: raw.adopt,
        control: raw.control,
        close: raw.close?,
    })
}

fn describe(raw: &'static RawType) -> Result<TypeInfo, String> {
    if raw.properties_count > PROPERTIES_MAX {
        return Err(format!("{} properties, at most {PROPERTIES_MAX} can be", raw.properties_count));
    }
    let listed: &[RawProperty] = if raw.properties.is_null() {
        &[]
    } else {
        // SAFETY: by csv_resource.h an array of that many, which lives as long as the process.
        unsafe { std::slice::from_raw_parts(raw.properties, raw.properties_count) }
    };
    let mut properties = Vec::new();
    for property in listed {
        properties.push(Property {
            name: text(property.name).ok_or("a property has no name")?,
            numbered: false,
            required: property.required != 0,
            default: text(property.fallback),
            form: Form::Text,
            help: text(property.help).unwrap_or_default(),
            live: false,
        });
    }
    Ok(TypeInfo {
        name: text(raw.name).ok_or("the type has no name")?,
        help: text(raw.help).unwrap_or_default(),
        properties,
        verbs: Vec::new(),
        looks_alive: Duration::from_millis(raw.looks_alive_ms.into()),
        is_alive: Duration::from_millis(raw.is_alive_ms.into()),
        shared: false,
    })
}

/// A C string, if there is one.
fn text(from: *const c_char) -> Option<String> {
    // SAFETY: by csv_resource.h null, or a string with its NUL that lives at least as long as the call.
    (!from.is_null()).then(|| unsafe { CStr::from_ptr(from) }.to_string_lossy().into_owned())
}

impl fmt::Debug for LibraryType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LibraryType").field("info", &self.info).finish_non_exhaustive()
    }
}

impl ResourceType for LibraryType {
    fn info(&self) -> TypeInfo {
        self.info.clone()
    }

    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure> {
        let strings = Strings::new(&spec, &context)?;
        let context = Box::new(context);
        let host = Box::new(RawHost {
            abi: ABI,
            size: size_of_u32::<RawHost>(),
            host: &raw const *context,
            progress: host_progress,
            cancelled: host_cancelled,
            report: host_report,
            event: host_event,
            save: host_save,
            saved: host_saved,
        });
        let raw = strings.raw(spec.generation);
        let mut resource = std::ptr::null_mut();
        let mut why = Buffer::new(WHY_BYTES);
        // SAFETY: host lives in the box until close has returned, the specification and what it points to until the end of
        // this call, the buffer has the size that is said.
        let status = unsafe {
            (self.entries.open)(&raw const *host, &raw const raw, &raw mut resource, why.at(), why.size())
        };
        outcome(status, &why)?;
        Ok(Box::new(LibraryResource { entries: self.entries, resource, _host: host, _context: context }))
    }
}

/// A resource of a library.
struct LibraryResource {
    entries: Entries,
    resource: *mut c_void,
    /// Until close has returned; in boxes, since the library has their addresses.
    _host: Box<RawHost>,
    _context: Box<Context>,
}

// SAFETY: by csv_resource.h the entry points of a resource may be called by any thread, one at a time, which `&mut` sees
// to; what the boxes hold is shared only with callbacks, which use it as `&Context`, and a Context is Sync.
unsafe impl Send for LibraryResource {}

impl LibraryResource {
    fn enter(&mut self, entry: Entry) -> Result<(), Failure> {
        let mut why = Buffer::new(WHY_BYTES);
        // SAFETY: the pointer is what this library's open gave, and close comes last; the buffer has the size that is said.
        let status = unsafe { entry(self.resource, why.at(), why.size()) };
        outcome(status, &why)
    }
}

impl Resource for LibraryResource {
    fn adopt(&mut self) -> Result<(), Failure> {
        self.enter(self.entries.adopt.unwrap_or(self.entries.is_alive))
    }

    fn online(&mut self) -> Result<(), Failure> {
        self.enter(self.entries.online)
    }

    fn offline(&mut self) -> Result<(), Failure> {
        self.enter(self.entries.offline)
    }

    fn terminate(&mut self) -> Result<(), Failure> {
        self.enter(self.entries.terminate)
    }

    fn looks_alive(&mut self) -> Result<(), Failure> {
        self.enter(self.entries.looks_alive)
    }

    fn is_alive(&mut self) -> Result<(), Failure> {
        self.enter(self.entries.is_alive)
    }

    fn control(&mut self, verb: &str, arguments: &Value) -> Result<Value, Failure> {
        let unsupported = || Failure::Unsupported(format!("this resource type cannot \"{verb}\""));
        let control = self.entries.control.ok_or_else(unsupported)?;
        let (verb, arguments) = (c_string(verb)?, c_string(&arguments.to_string())?);
        let (mut answer, mut why) = (Buffer::new(ANSWER_BYTES), Buffer::new(WHY_BYTES));
        // SAFETY: as in `enter`; both strings live until the end of the call.
        let status = unsafe {
            control(
                self.resource,
                verb.as_ptr(),
                arguments.as_ptr(),
                answer.at(),
                answer.size(),
                why.at(),
                why.size(),
            )
        };
        outcome(status, &why)?;
        let answer = answer.text();
        if answer.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&answer).map_err(|e| Failure::new(format!("its answer is no JSON: {e}")))
    }
}

impl Drop for LibraryResource {
    fn drop(&mut self) {
        // SAFETY: nothing uses the resource after this, and what the library has of the host is freed after it.
        unsafe { (self.entries.close)(self.resource) }
    }
}

/// What `csv_status` means.
fn outcome(status: c_int, why: &Buffer) -> Result<(), Failure> {
    let said = |otherwise: &str| {
        let text = why.text();
        if text.is_empty() { otherwise.to_owned() } else { text }
    };
    match status {
        0 => Ok(()),
        1 => Err(Failure::Failed(said("it failed and does not say why"))),
        2 => Err(Failure::NotHere(said("it cannot work on this node and does not say why"))),
        3 => Err(Failure::Config(said("it is not configured well and does not say why"))),
        4 => Err(Failure::Unsupported(said("it cannot do that"))),
        5 => Err(Failure::Cancelled),
        other => Err(Failure::Failed(said(&format!("it answered {other}, which means nothing")))),
    }
}

/// Room for a text that a library writes.
struct Buffer(Vec<u8>);

impl Buffer {
    fn new(bytes: usize) -> Buffer {
        Buffer(vec![0; bytes])
    }

    fn at(&mut self) -> *mut c_char {
        self.0.as_mut_ptr().cast()
    }

    /// One less than there is, so that a final NUL is always there.
    fn size(&self) -> usize {
        self.0.len() - 1
    }

    fn text(&self) -> String {
        let text = CStr::from_bytes_until_nul(&self.0).unwrap_or_default();
        text.to_string_lossy().into_owned()
    }
}

/// What a `csv_spec` points to.
struct Strings {
    name: CString,
    group: CString,
    node: CString,
    run_dir: CString,
    state_dir: CString,
    json: CString,
    /// Keeps what `values` points to.
    _properties: Vec<(CString, CString)>,
    values: Vec<RawValue>,
}

impl Strings {
    fn new(spec: &Spec, context: &Context) -> Result<Strings, Failure> {
        let node = context.node();
        let mut properties = Vec::new();
        for (name, value) in &spec.properties {
            properties.push((c_string(name)?, c_string(value)?));
        }
        let values =
            properties.iter().map(|(n, v)| RawValue { name: n.as_ptr(), value: v.as_ptr() }).collect();
        Ok(Strings {
            name: c_string(&spec.name)?,
            group: c_string(&spec.group)?,
            node: c_string(&node.node)?,
            run_dir: c_string(&node.run_dir.to_string_lossy())?,
            state_dir: c_string(&node.state_dir.to_string_lossy())?,
            json: c_string(&serde_json::to_string(spec).map_err(Failure::new)?)?,
            _properties: properties,
            values,
        })
    }

    fn raw(&self, generation: u64) -> RawSpec {
        RawSpec {
            abi: ABI,
            size: size_of_u32::<RawSpec>(),
            name: self.name.as_ptr(),
            group: self.group.as_ptr(),
            node: self.node.as_ptr(),
            run_dir: self.run_dir.as_ptr(),
            state_dir: self.state_dir.as_ptr(),
            generation,
            properties: self.values.as_ptr(),
            properties_count: self.values.len(),
            json: self.json.as_ptr(),
        }
    }
}

fn c_string(text: &str) -> Result<CString, Failure> {
    CString::new(text).map_err(|_| Failure::Config("a text contains NUL".to_owned()))
}

fn size_of_u32<T>() -> u32 {
    u32::try_from(std::mem::size_of::<T>()).unwrap_or(u32::MAX)
}

/// The context that a callback was given.
///
/// # Safety
/// `host` is that of a `csv_host` whose resource has not been closed.
unsafe fn context<'a>(host: *const Context) -> &'a Context {
    // SAFETY: what the caller promises; the box outlives close.
    unsafe { &*host }
}

unsafe extern "C" fn host_progress(host: *const Context, what: *const c_char) {
    // SAFETY: by csv_resource.h callbacks are called from open until close returns.
    unsafe { context(host) }.progress(&text(what).unwrap_or_default());
}

unsafe extern "C" fn host_cancelled(host: *const Context) -> c_int {
    // SAFETY: by csv_resource.h callbacks are called from open until close returns.
    unsafe { context(host) }.cancelled().into()
}

unsafe extern "C" fn host_report(host: *const Context, why: *const c_char) {
    // SAFETY: by csv_resource.h callbacks are called from open until close returns.
    unsafe { context(host) }.report(text(why).map_or(Ok(()), Err));
}

unsafe extern "C" fn host_event(host: *const Context, level: c_int, what: *const c_char) {
    let level = match level {
        0 => EventLevel::Info,
        1 => EventLevel::Warning,
        _ => EventLevel::Error,
    };
    // SAFETY: by csv_resource.h callbacks are called from open until close returns.
    unsafe { context(host) }.event(level, &text(what).unwrap_or_default());
}

unsafe extern "C" fn host_save(host: *const Context, state: *const c_char) {
    // SAFETY: by csv_resource.h callbacks are called from open until close returns.
    let context = unsafe { context(host) };
    // The function returns nothing, so a library cannot be told.
    if let Err(failure) = context.save(text(state).map(Value::String)) {
        context.event(EventLevel::Error, &failure.to_string());
    }
}

unsafe extern "C" fn host_saved(host: *const Context, buffer: *mut c_char, size: usize) -> usize {
    // SAFETY: by csv_resource.h callbacks are called from open until close returns.
    let saved = unsafe { context(host) }.saved();
    let saved = saved.as_ref().and_then(Value::as_str).unwrap_or_default();
    if !buffer.is_null() && size > 0 {
        let fits = saved.len().min(size - 1);
        // SAFETY: by csv_resource.h there are `size` bytes at `buffer`; `fits` and the NUL are no more.
        unsafe {
            std::ptr::copy_nonoverlapping(saved.as_ptr(), buffer.cast(), fits);
            buffer.add(fits).write(0);
        }
    }
    saved.len()
}
