//! An XML document as elements with byte spans, and the splicing of edits into its text.
//!
//! Purpose: know exactly which bytes of a domain document an element, an attribute or an attribute's value occupies, so
//! that a rewrite replaces those bytes and no others.
//!
//! Invariants:
//! - I1: every span lies within the input, on character boundaries; a child's span lies within its parent's content.
//! - I2: [`Edits::apply`] copies every byte outside the edited spans, unchanged and in order.
//!
//! It does not expand namespaces (names are compared as written), keeps no text, comment or CDATA (they stay bytes between
//! spans), and refuses what could make two parsers disagree: document types, duplicate attributes, unknown entities in
//! values that we read.

use std::ops::Range;

use quick_xml::{Reader, events::Event};

/// Deepest nesting accepted: the limit of libxml2, which libvirt uses.
pub const DEPTH_MAX: usize = 256;
/// Largest document accepted, in bytes. KubeVirt's domains are 5 to 50 KiB, and one gRPC message holds at most 4 MiB.
pub const DOCUMENT_BYTES_MAX: usize = 4 << 20;

/// Why a document could not be read. All of these are permanent for the same input.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum XmlError {
    /// Larger than [`DOCUMENT_BYTES_MAX`].
    #[error("the document has {found} bytes, at most {DOCUMENT_BYTES_MAX} are accepted")]
    TooLarge {
        /// Its size in bytes.
        found: usize,
    },
    /// Not UTF-8, which is what Go and libvirt write.
    #[error("the document is not UTF-8 from byte {0} on")]
    NotUtf8(usize),
    /// Not well-formed.
    #[error("not well-formed near byte {at}: {what}")]
    Syntax {
        /// Byte offset.
        at: usize,
        /// What the parser said.
        what: String,
    },
    /// A document type could define entities that change what names and values mean.
    #[error("a document type declaration (byte {0}) is not accepted")]
    DocType(usize),
    /// Nested deeper than [`DEPTH_MAX`].
    #[error("elements are nested deeper than {DEPTH_MAX} (byte {0})")]
    TooDeep(usize),
    /// An edit would have overlapped another one: a bug of ours, reported instead of producing a broken domain.
    #[error("two edits overlap at byte {0}")]
    Overlap(usize),
}

/// A half-open range of byte offsets into the document.
pub type Span = Range<usize>;

/// One attribute of a start tag.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attribute {
    /// The name as written, with its prefix.
    pub name: Span,
    /// The value without its quotes, still escaped.
    pub value: Span,
    /// White space before the name, name, `=`, and the quoted value: what has to go to remove the attribute.
    pub whole: Span,
}

/// One element.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Element {
    /// The name as written, with its prefix.
    pub name: Span,
    /// The start tag, from `<` to `>`.
    pub open: Span,
    /// Ends in `/>` and therefore has no children and no end tag.
    pub self_closing: bool,
    /// From the `<` of the start tag to the `>` of the end tag.
    pub whole: Span,
    /// The end tag; empty and at the end of `whole` when `self_closing`.
    pub close: Span,
    /// In document order.
    pub attributes: Vec<Attribute>,
    /// In document order.
    pub children: Vec<Element>,
}

/// A parsed document: the text and its root element.
#[derive(Clone, Debug)]
pub struct Document<'a> {
    text: &'a str,
    /// The document's root element.
    pub root: Element,
}

impl<'a> Document<'a> {
    /// Parse `bytes`. Offsets in all spans count from the first byte of `bytes`, a byte-order mark included.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, XmlError> {
        if bytes.len() > DOCUMENT_BYTES_MAX {
            return Err(XmlError::TooLarge { found: bytes.len() });
        }
        let text = std::str::from_utf8(bytes).map_err(|e| XmlError::NotUtf8(e.valid_up_to()))?;
        let root = parse_root(text)?;
        Ok(Document { text, root })
    }

    /// The whole text.
    pub fn text(&self) -> &'a str {
        self.text
    }

    /// The bytes of a span.
    pub fn slice(&self, span: &Span) -> &'a str {
        &self.text[span.clone()]
    }

    /// The name of an element as written.
    pub fn name(&self, element: &Element) -> &'a str {
        self.slice(&element.name)
    }

    /// The attribute called `name`.
    pub fn attribute<'e>(&self, element: &'e Element, name: &str) -> Option<&'e Attribute> {
        element.attributes.iter().find(|a| self.slice(&a.name) == name)
    }

    /// The unescaped value of the attribute called `name`. A value with an entity that is not one of XML's five is given
    /// as written: it equals no name of ours.
    pub fn value(&self, element: &Element, name: &str) -> Option<String> {
        let raw = self.slice(&self.attribute(element, name)?.value);
        Some(quick_xml::escape::unescape(raw).map_or_else(|_| raw.to_owned(), |v| v.into_owned()))
    }

    /// The children called `name`.
    pub fn children<'e>(&self, element: &'e Element, name: &str) -> impl Iterator<Item = &'e Element> {
        element.children.iter().filter(move |c| self.name(c) == name)
    }
}

fn parse_root(text: &str) -> Result<Element, XmlError> {
    // The reader drops a byte-order mark without counting it, so it never gets to see one.
    let base = text.len() - text.trim_start_matches('\u{feff}').len();
    if base > '\u{feff}'.len_utf8() {
        return Err(XmlError::Syntax { at: 0, what: "more than one byte-order mark".into() });
    }
    let mut reader = Reader::from_str(&text[base..]);
    reader.config_mut().check_end_names = true;
    let mut open: Vec<Element> = Vec::new();
    let mut root: Option<Element> = None;
    loop {
        let start = base + position(reader.buffer_position());
        let event = reader
            .read_event()
            .map_err(|e| XmlError::Syntax { at: base + position(reader.error_position()), what: e.to_string() })?;
        let end = base + position(reader.buffer_position());
        let finished = match event {
            Event::Start(_) => {
                if open.len() >= DEPTH_MAX {
                    return Err(XmlError::TooDeep(start));
                }
                open.push(start_tag(text, start..end, false)?);
                None
            }
            Event::Empty(_) => Some(start_tag(text, start..end, true)?),
            Event::End(_) => {
                let mut element = open.pop().ok_or_else(|| syntax(start, "an end tag without a start tag"))?;
                element.close = start..end;
                element.whole.end = end;
                Some(element)
            }
            Event::DocType(_) => return Err(XmlError::DocType(start)),
            Event::Text(t) => {
                if open.is_empty() && !t.trim().is_empty() {
                    return Err(syntax(start, "text outside the root element"));
                }
                None
            }
            Event::CData(_) | Event::GeneralRef(_) => {
                if open.is_empty() {
                    return Err(syntax(start, "content outside the root element"));
                }
                None
            }
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) => None,
            Event::Eof => break,
        };
        if let Some(element) = finished {
            match open.last_mut() {
                Some(parent) => parent.children.push(element),
                None if root.is_none() => root = Some(element),
                None => return Err(syntax(start, "a second root element")),
            }
        }
    }
    if let Some(unclosed) = open.last() {
        return Err(syntax(unclosed.whole.start, "this element is never closed"));
    }
    root.ok_or_else(|| syntax(text.len(), "no root element"))
}

fn position(offset: u64) -> usize {
    usize::try_from(offset).expect("an offset into a slice fits usize")
}

fn syntax(at: usize, what: &str) -> XmlError {
    XmlError::Syntax { at, what: what.to_owned() }
}

/// Split a start tag (`span` runs from `<` to `>`) into its name and attributes.
fn start_tag(text: &str, span: Span, self_closing: bool) -> Result<Element, XmlError> {
    let bytes = text.as_bytes();
    let limit = span.end - if self_closing { 2 } else { 1 };
    let name = span.start + 1..run(bytes, span.start + 1, limit, |b| !is_space(b));
    if name.is_empty() {
        return Err(syntax(span.start, "a tag without a name"));
    }
    let mut attributes: Vec<Attribute> = Vec::new();
    let mut at = name.end;
    loop {
        let whole_start = at;
        at = run(bytes, at, limit, is_space);
        if at == limit {
            break;
        }
        let attribute = attribute(text, whole_start, at, limit)?;
        let written = &text[attribute.name.clone()];
        if attributes.iter().any(|a| &text[a.name.clone()] == written) {
            return Err(syntax(at, "an attribute is given twice"));
        }
        at = attribute.whole.end;
        attributes.push(attribute);
    }
    let end = span.end;
    Ok(Element {
        name,
        whole: span.clone(),
        open: span,
        self_closing,
        close: end..end,
        attributes,
        children: Vec::new(),
    })
}

fn attribute(text: &str, whole_start: usize, at: usize, limit: usize) -> Result<Attribute, XmlError> {
    let bytes = text.as_bytes();
    if whole_start == at {
        return Err(syntax(at, "no white space before an attribute"));
    }
    let name = at..run(bytes, at, limit, |b| !is_space(b) && !matches!(b, b'=' | b'"' | b'\'' | b'<'));
    let equals = run(bytes, name.end, limit, is_space);
    if name.is_empty() || equals == limit || bytes[equals] != b'=' {
        return Err(syntax(at, "an attribute without a name or a value"));
    }
    let quote_at = run(bytes, equals + 1, limit, is_space);
    let quote = *bytes.get(quote_at).unwrap_or(&0);
    if quote_at == limit || !matches!(quote, b'"' | b'\'') {
        return Err(syntax(at, "an attribute value without quotes"));
    }
    let value = quote_at + 1..run(bytes, quote_at + 1, limit, |b| b != quote && b != b'<');
    if value.end == limit || bytes[value.end] != quote {
        return Err(syntax(at, "an attribute value that does not end, or that contains '<'"));
    }
    let whole = whole_start..value.end + 1;
    Ok(Attribute { name, value, whole })
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

/// The end of the run of bytes from `at` (up to `limit`) that satisfy `keep`.
fn run(bytes: &[u8], at: usize, limit: usize, keep: impl Fn(u8) -> bool) -> usize {
    bytes[at..limit].iter().position(|b| !keep(*b)).map_or(limit, |n| at + n)
}

/// Replacements to be made in a document's text.
#[derive(Clone, Default, Debug)]
pub struct Edits(Vec<(Span, String)>);

impl Edits {
    /// Replace the bytes of `span`; an empty span inserts before its position. Edits at one position apply in the
    /// order in which they were added.
    pub fn replace(&mut self, span: Span, with: impl Into<String>) {
        self.0.push((span, with.into()));
    }

    /// Give `element`'s attribute `name` the `value` (escaped here), in place, or append it to the start tag.
    pub fn set_attribute(&mut self, document: &Document<'_>, element: &Element, name: &str, value: &str) {
        if document.value(element, name).as_deref() == Some(value) {
            return;
        }
        let escaped = quick_xml::escape::escape(value);
        match document.attribute(element, name) {
            Some(attribute) => self.replace(attribute.value.clone(), escaped),
            None => {
                let end = element.attributes.last().map_or(element.name.end, |a| a.whole.end);
                self.replace(end..end, format!(" {name}=\"{escaped}\""));
            }
        }
    }

    /// Remove `element`'s attribute `name`, if it has one, with the white space before it.
    pub fn remove_attribute(&mut self, document: &Document<'_>, element: &Element, name: &str) {
        if let Some(attribute) = document.attribute(element, name) {
            self.replace(attribute.whole.clone(), "");
        }
    }

    /// The text with all edits made.
    pub fn apply(mut self, text: &str) -> Result<String, XmlError> {
        // An insertion at the place where a replacement begins goes before it.
        self.0.sort_by_key(|(span, _)| (span.start, span.end));
        let growth: usize = self.0.iter().map(|(_, with)| with.len()).sum();
        let mut out = String::with_capacity(text.len() + growth);
        let mut copied = 0;
        for (span, with) in &self.0 {
            if span.start < copied {
                return Err(XmlError::Overlap(span.start));
            }
            out.push_str(&text[copied..span.start]);
            out.push_str(with);
            copied = span.end;
        }
        out.push_str(&text[copied..]);
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_point_at_exactly_the_bytes_of_names_values_and_elements() {
        let text = "\u{feff}<?xml version='1.0'?>\n<a x = '1'\n y=\"&lt;é\"><!-- <b/> --><b/><![CDATA[<b>]]><n:c></n:c ></a>\n";
        let document = Document::parse(text.as_bytes()).expect("well-formed");
        let root = &document.root;
        assert_eq!(document.name(root), "a");
        assert_eq!(document.slice(&root.attributes[0].whole), " x = '1'");
        assert_eq!(document.slice(&root.attributes[1].value), "&lt;é");
        assert_eq!(document.value(root, "y").as_deref(), Some("<é"));
        assert_eq!(
            root.children.iter().map(|c| document.slice(&c.whole)).collect::<Vec<_>>(),
            ["<b/>", "<n:c></n:c >"]
        );
        assert_eq!(document.slice(&root.close), "</a>");
    }

    #[test]
    fn what_parsers_could_understand_differently_is_refused() {
        for (text, part) in [
            ("<!DOCTYPE a [<!ENTITY x 'y'>]><a/>", "document type"),
            ("<a b='1' b='2'/>", "given twice"),
            ("<a b=1/>", "without quotes"),
            ("<a b='1'c='2'/>", "no white space"),
            ("<a><b></a></b>", "not well-formed"),
            ("<a/><b/>", "second root"),
            ("<a>", "never closed"),
            ("", "no root"),
            ("x<a/>", "outside the root"),
            ("<a b='<'/>", "not well-formed"),
        ] {
            let error = Document::parse(text.as_bytes()).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn nesting_deeper_than_the_limit_is_refused_and_the_limit_itself_is_not() {
        let nested = |depth: usize| format!("{}{}", "<a>".repeat(depth), "</a>".repeat(depth));
        assert!(Document::parse(nested(DEPTH_MAX).as_bytes()).is_ok());
        assert!(matches!(Document::parse(nested(DEPTH_MAX + 1).as_bytes()), Err(XmlError::TooDeep(_))));
    }

    #[test]
    fn edits_keep_quotes_and_white_space_and_refuse_to_overlap() {
        let text = "<d  type='file'\tio=\"native\" />";
        let document = Document::parse(text.as_bytes()).expect("well-formed");
        let mut edits = Edits::default();
        edits.set_attribute(&document, &document.root, "type", "net\"work");
        edits.set_attribute(&document, &document.root, "e", "stop");
        edits.remove_attribute(&document, &document.root, "io");
        assert_eq!(edits.apply(text).expect("apart"), "<d  type='net&quot;work' e=\"stop\" />");
        let mut touching = Edits::default();
        touching.replace(0..1, "(");
        touching.replace(0..0, "first ");
        assert_eq!(touching.apply("<d/>").expect("apart"), "first (d/>");
        let mut overlapping = Edits::default();
        overlapping.replace(0..4, "x");
        overlapping.replace(3..5, "y");
        assert_eq!(overlapping.apply(text), Err(XmlError::Overlap(3)));
    }
}
