use super::*;

fn read(decoder: &mut Decoder, hex: &str) -> Result<Vec<(String, String)>, HpackError> {
    let block: Vec<u8> = hex
        .split_whitespace()
        .collect::<String>()
        .as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect();
    let mut fields = Vec::new();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    decoder.decode(&block, |name, value| fields.push((text(name), text(value))))?;
    Ok(fields)
}

fn pairs(all: &[(&str, &str)]) -> Vec<(String, String)> {
    all.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
}

/// RFC 7541 appendix C.4: three requests in the Huffman code over one table.
#[test]
fn reads_the_examples_of_the_rfc() {
    let mut decoder = Decoder::new();
    let first = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")];
    assert_eq!(read(&mut decoder, "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff"), Ok(pairs(&first)));
    let second = [&first[..], &[("cache-control", "no-cache")]].concat();
    assert_eq!(read(&mut decoder, "8286 84be 5886 a8eb 1064 9cbf"), Ok(pairs(&second)));
    let third = [
        (":method", "GET"),
        (":scheme", "https"),
        (":path", "/index.html"),
        (":authority", "www.example.com"),
        ("custom-key", "custom-value"),
    ];
    let hex = "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf";
    assert_eq!(read(&mut decoder, hex), Ok(pairs(&third)));
    assert_eq!(decoder.used, 164);
}

#[test]
fn what_is_written_is_read() {
    let mut block = Vec::new();
    named(&mut block, index::METHOD, b"CONNECT");
    named(&mut block, index::AUTHORITY, b"10.0.0.1:80");
    literal(&mut block, b"baggage", "x".repeat(300).as_bytes());
    indexed(&mut block, index::STATUS);
    let mut fields = Vec::new();
    Decoder::new()
        .decode(&block, |n, v| fields.push((String::from_utf8_lossy(n).into_owned(), v.len())))
        .unwrap();
    let expected = [(":method", 7), (":authority", 11), ("baggage", 300), (":status", 3)];
    assert_eq!(fields, expected.map(|(n, l)| (n.to_owned(), l)));
}

#[test]
fn hostile_blocks_are_refused() {
    for (hex, expected) in [
        ("80", HpackError::Index),
        ("c0", HpackError::Index),
        ("ff", HpackError::Truncated),
        ("ff ff ff ff ff ff ff 7f", HpackError::Integer),
        ("3f e1 ff 03", HpackError::Size),
        ("82 20", HpackError::Size),
        ("00 05 61", HpackError::Truncated),
        ("00 7f ff ff 7f", HpackError::TooLarge),
        // A code that ends with bits that are not set, and one with a whole byte of padding.
        ("00 81 00 00", HpackError::Huffman),
        ("00 82 1f ff 00", HpackError::Huffman),
        // The end of a string within it.
        ("00 84 ff ff ff ff 00", HpackError::Huffman),
    ] {
        assert_eq!(read(&mut Decoder::new(), hex), Err(expected), "{hex}");
    }
}

#[test]
fn a_list_of_many_small_fields_is_refused() {
    let block = vec![0x82; MAX_LIST / 40];
    assert_eq!(Decoder::new().decode(&block, |_, _| ()), Err(HpackError::TooLarge));
}

#[test]
fn an_entry_that_is_larger_than_the_table_empties_it() {
    let mut decoder = Decoder::new();
    decoder.insert(b"a", b"b");
    decoder.insert(b"c", &[0; TABLE]);
    assert_eq!((decoder.used, decoder.entries.len()), (0, 0));
}
