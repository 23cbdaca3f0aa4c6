//! How clients' requests are delimited: where weir and a gateway could disagree, weir refuses, or sends on one reading only.

use crate::world::{are_refused, pass_as};

fn post(fields: &str, body: &str) -> String {
    format!("POST /v1/files HTTP/1.1\r\nhost: weir.test\r\n{fields}\r\n\r\n{body}")
}

/// What reaches the gateway of a body.
fn posted(body: &str) -> String {
    let head = "POST /v1/files HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir";
    format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

#[tokio::test]
async fn a_request_with_both_framings_is_read_in_chunks_and_its_connection_closed() {
    let chunks = "5\r\nhello\r\n0\r\n\r\n";
    let both = |fields: &str| post(fields, chunks);
    pass_as(
        true,
        [
            ("a length before", both("content-length: 5\r\ntransfer-encoding: chunked"), posted("hello")),
            ("a length behind", both("transfer-encoding: chunked\r\ncontent-length: 5"), posted("hello")),
            ("no bytes", both("content-length: 0\r\ntransfer-encoding: chunked"), posted("hello")),
            ("a length beyond", both("transfer-encoding: chunked\r\ncontent-length: 500"), posted("hello")),
            ("a malformed length behind", both("transfer-encoding: chunked\r\ncontent-length: x"), posted("hello")),
        ],
    )
    .await;
    are_refused("", 400, [("a malformed length before", both("content-length: x\r\ntransfer-encoding: chunked"))])
        .await;
}

#[tokio::test]
async fn chunks_are_known_by_their_name_however_it_is_written() {
    let coded = |field: &str| post(field, "5\r\nhello\r\n0\r\n\r\n");
    pass_as(
        false,
        [
            ("lower case", coded("transfer-encoding: chunked"), posted("hello")),
            ("Chunked", coded("Transfer-Encoding: Chunked"), posted("hello")),
            ("CHUNKED", coded("TRANSFER-ENCODING: CHUNKED"), posted("hello")),
            ("no space", coded("transfer-encoding:chunked"), posted("hello")),
            ("spaces and tabs", coded("transfer-encoding: \t chunked \t "), posted("hello")),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_transfer_coding_that_is_not_chunks_alone_is_refused() {
    let coded = |fields: &str| post(fields, "5\r\nhello\r\n0\r\n\r\n");
    are_refused(
        "",
        400,
        [
            ("xchunked", coded("transfer-encoding: xchunked")),
            ("chunkedx", coded("transfer-encoding: chunkedx")),
            ("identity", coded("transfer-encoding: identity")),
            ("gzip", coded("transfer-encoding: gzip")),
            ("nothing", coded("transfer-encoding:")),
            ("chunks below identity", coded("transfer-encoding: chunked, identity")),
            (
                "chunks below identity, in two fields",
                coded("transfer-encoding: chunked\r\ntransfer-encoding: identity"),
            ),
            ("identity below chunks", coded("transfer-encoding: identity, chunked")),
            (
                "identity below chunks, in two fields",
                coded("transfer-encoding: identity\r\ntransfer-encoding: chunked"),
            ),
            ("gzip below chunks", coded("transfer-encoding: gzip, chunked")),
            ("chunks twice", coded("transfer-encoding: chunked, chunked")),
            ("chunks twice, in two fields", coded("transfer-encoding: chunked\r\ntransfer-encoding: chunked")),
            ("a comma behind", coded("transfer-encoding: chunked,")),
            ("a comma before", coded("transfer-encoding: ,chunked")),
            ("a parameter", coded("transfer-encoding: chunked;q=1")),
            ("quotes", coded("transfer-encoding: \"chunked\"")),
            ("single quotes", coded("transfer-encoding: 'chunked'")),
            ("a vertical tab before", coded("transfer-encoding: \x0bchunked")),
            ("a form feed behind", coded("transfer-encoding: chunked\x0c")),
            ("a NUL behind", coded("transfer-encoding: chunked\0")),
            ("a line of its own", coded("transfer-encoding:\r\n chunked")),
            ("a line of its own, by a tab", coded("transfer-encoding:\r\n\tchunked")),
            ("continued", coded("transfer-encoding: chunked\r\n , identity")),
            ("folded into another field", coded("x-a: 1\r\n transfer-encoding: chunked")),
            ("a space before the colon", coded("transfer-encoding : chunked")),
            ("a tab before the colon", coded("transfer-encoding\t: chunked")),
            ("a space before the name", coded(" transfer-encoding: chunked")),
            ("CR before the name", coded("x-a: 1\rtransfer-encoding: chunked")),
            ("with a length", coded("transfer-encoding: x\r\ncontent-length: 15")),
            ("not ASCII", coded("transfer-encoding: chunke\u{212a}")),
        ],
    )
    .await;
}

#[tokio::test]
async fn chunks_in_http_1_0_are_refused() {
    let old = |fields: &str| format!("POST /v1/files HTTP/1.0\r\n{fields}\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
    are_refused(
        "",
        400,
        [
            ("alone", old("transfer-encoding: chunked")),
            ("with a length", old("content-length: 5\r\ntransfer-encoding: chunked")),
            ("kept alive", old("connection: keep-alive\r\ntransfer-encoding: chunked")),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_length_that_is_none_is_refused() {
    let long = |field: &str| post(field, "hello");
    are_refused(
        "",
        400,
        [
            ("a plus", long("content-length: +5")),
            ("a minus", long("content-length: -1")),
            ("hexadecimal", long("content-length: 0x5")),
            ("a word", long("content-length: five")),
            ("nothing", long("content-length:")),
            ("two with a space", long("content-length: 5 5")),
            ("a list", long("content-length: 5,5")),
            ("a list that differs", long("content-length: 5, 6")),
            ("an empty item", long("content-length: 5,")),
            ("a fraction", long("content-length: 5.0")),
            ("an exponent", long("content-length: 5e0")),
            ("an underscore", long("content-length: 0_5")),
            ("letters behind", long("content-length: 5a")),
            ("a semicolon", long("content-length: 5;a")),
            ("quotes", long("content-length: \"5\"")),
            ("digits that are not ASCII", long("content-length: \u{ff15}")),
            ("NUL", long("content-length: 5\0")),
            ("a vertical tab", long("content-length: \x0b5")),
            ("two that differ", long("content-length: 5\r\ncontent-length: 6")),
            ("two that differ, no bytes first", long("content-length: 0\r\ncontent-length: 5")),
            ("two, one malformed", long("content-length: 5\r\ncontent-length: x")),
            ("beyond 64 bits", long("content-length: 18446744073709551621")),
            ("folded", long("content-length:\r\n 5")),
            ("continued", long("content-length: 5\r\n 5")),
            ("a space before the colon", long("content-length : 5")),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_length_that_no_body_can_have_is_refused() {
    let long = |length: &str| post(&format!("content-length: {length}"), "hello");
    let metered = long("9223372036854775807").replace("/v1/files", "/v1/chat/completions");
    are_refused("", 413, [("all of 63 bits, metered", metered)]).await;
    are_refused("", 431, [("all of 64 bits", long("18446744073709551615"))]).await;
}

#[tokio::test]
async fn malformed_chunks_are_refused() {
    let chunks = |says: &str| post("transfer-encoding: chunked", &format!("2\r\nab\r\n{says}"));
    let many: String = (0..200).map(|number| format!("x-{number}: 1\r\n")).collect();
    are_refused(
        "",
        400,
        [
            ("no size", chunks("\r\nhello\r\n0\r\n\r\n")),
            ("a word for a size", chunks("five\r\nhello\r\n0\r\n\r\n")),
            ("0x", chunks("0x5\r\nhello\r\n0\r\n\r\n")),
            ("a negative size", chunks("-5\r\nhello\r\n0\r\n\r\n")),
            ("a plus", chunks("+5\r\nhello\r\n0\r\n\r\n")),
            ("a size beyond 64 bits", chunks("10000000000000005\r\nhello\r\n0\r\n\r\n")),
            ("a size that wraps to none", chunks("10000000000000000\r\n\r\n0\r\n\r\n")),
            ("a size with an underscore", chunks("0_5\r\nhello\r\n0\r\n\r\n")),
            ("a space before the size", chunks(" 5\r\nhello\r\n0\r\n\r\n")),
            ("two sizes", chunks("5 5\r\nhello\r\n0\r\n\r\n")),
            ("LF after the size", chunks("5\nhello\r\n0\r\n\r\n")),
            ("CR after the size", chunks("5\rhello\r\n0\r\n\r\n")),
            ("LF after the last size", chunks("0\n\r\n")),
            ("LF in an extension", chunks("5;a\nhello\r\n0\r\n\r\n")),
            ("CR in an extension", chunks("5;a\rb\r\nhello\r\n0\r\n\r\n")),
            ("a chunk hidden in an extension", chunks("0;\n5\r\nhello\r\n0\r\n\r\n")),
            ("extensions of 20 KiB", chunks(&format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(20 << 10)))),
            ("no CRLF after the data", chunks("5\r\nhello0\r\n\r\n")),
            ("LF after the data", chunks("5\r\nhello\n0\r\n\r\n")),
            ("more data than the size says", chunks("5\r\nhello, you\r\n0\r\n\r\n")),
            ("trailers of 20 KiB", chunks(&format!("0\r\nx-a: {}\r\n\r\n", "a".repeat(20 << 10)))),
            ("200 trailers", chunks(&format!("0\r\n{many}\r\n"))),
            ("a trailer without a colon", chunks("0\r\nhello\r\n\r\n")),
            ("a trailer with a space before its colon", chunks("0\r\nx-a : 1\r\n\r\n")),
            ("a folded trailer", chunks("0\r\nx-a: 1\r\n 2\r\n\r\n")),
            ("a trailer with NUL", chunks("0\r\nx-a: \x00\r\n\r\n")),
        ],
    )
    .await;
}

#[tokio::test]
async fn trailers_and_extensions_stay_behind() {
    let chunks = |says: &str| post("transfer-encoding: chunked", says);
    let evil = "0\r\nhost: evil\r\ncontent-length: 500\r\ntransfer-encoding: chunked\r\nauthorization: Bearer evil\r\n\
                connection: close\r\nx-sum: 1\r\n\r\n";
    let extended = format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(1000));
    pass_as(
        false,
        [
            ("trailers", chunks(&format!("5\r\nhello\r\n{evil}")), posted("hello")),
            ("trailers of no body", chunks(evil), posted("")),
            ("an extension", chunks(&extended), posted("hello")),
            ("an extension in quotes", chunks("5;a=\"0;b\"\r\nhello\r\n0\r\n\r\n"), posted("hello")),
            ("a space behind the size", chunks("5 \r\nhello\r\n0 \r\n\r\n"), posted("hello")),
            ("many zeros", chunks("0000000000000005\r\nhello\r\n0000\r\n\r\n"), posted("hello")),
            ("upper-case digits", chunks("A\r\n0123456789\r\n0\r\n\r\n"), posted("0123456789")),
        ],
    )
    .await;
}

/// RFC 9112, 2.2 allows a reader to take it; what goes on is written anew.
#[tokio::test]
async fn lines_that_end_in_a_bare_lf_are_read_and_sent_on_as_they_should_be() {
    let get = "GET /v1/files/b HTTP/1.1\r\nhost: gateway.test\r\nx-a: 1\r\nvia: 1.1 weir\r\n\r\n".to_owned();
    let read = "GET /v1/files/b HTTP/1.1\r\nhost: weir.test\r\nx-a: 1\r\n\r\n";
    pass_as(
        false,
        [
            ("all lines", read.replace("\r\n", "\n"), get.clone()),
            ("the request line", read.replacen("\r\n", "\n", 1), get.clone()),
            ("the last", read.replace("1\r\n\r\n", "1\r\n\n"), get.clone()),
            ("empty lines before", format!("\r\n\n\r\n{read}"), get),
        ],
    )
    .await;
}
