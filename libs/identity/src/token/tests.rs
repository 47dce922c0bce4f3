use std::time::Duration;

use proptest::prelude::*;

use super::*;

const NOW: Timestamp = Timestamp(1_800_000_000_000);

fn token(kind: TokenKind, subject: &str) -> Token {
    Token::mint(TokenSpec {
        kind,
        address: "127.1.0.1:7443".into(),
        ca_pin: [7; 32],
        cluster: "us-east".parse().unwrap(),
        subject: subject.into(),
        expires_at: NOW + Duration::from_secs(900),
    })
}

#[test]
fn tokens_round_trip_with_blanks_around_them() {
    for (kind, subject) in [
        (TokenKind::Join, "agent"),
        (TokenKind::Local, "gateway/gateway-1"),
        (TokenKind::Local, "dns/dns-1"),
        (TokenKind::Local, "workload/shop/cart"),
    ] {
        let token = token(kind, subject);
        let text = format!(" {}\n", token.encode());
        assert_eq!(Token::parse_at(&text, NOW).unwrap(), token);
        assert!(text.trim().starts_with(&format!("isthmus-{kind}.")));
    }
}

#[test]
fn secrets_differ_and_stay_out_of_debug() {
    let (a, b) = (token(TokenKind::Join, "agent"), token(TokenKind::Join, "agent"));
    assert_ne!(a.secret, b.secret);
    assert_ne!(Token::secret_hash(&a.secret), Token::secret_hash(&b.secret));
    assert!(!format!("{a:?}").contains(&a.secret));
}

#[test]
fn every_beginning_of_a_token_is_called_cut_off() {
    let text = token(TokenKind::Local, "workload/shop/cart").encode();
    for end in 1..text.len() {
        assert_eq!(Token::parse_at(&text[..end], NOW), Err(TokenError::CutOff), "{end}");
    }
}

#[test]
fn other_texts_are_called_what_they_are() {
    for text in ["", "hello", "isthmus-admin.AAAA", "isthmus-join.a b", "isthmus-join.e30x", "isthmus-join.bnVsbA"] {
        assert!(matches!(Token::parse_at(text, NOW), Err(TokenError::Garbage(_))), "{text}");
    }
    assert!(matches!(Token::parse_at(&"x".repeat(MAX_TOKEN + 1), NOW), Err(TokenError::Garbage("it is too long"))));
}

#[test]
fn expired_tokens_say_when_and_how_to_get_another() {
    let later = NOW + Duration::from_secs(900);
    let error = Token::parse_at(&token(TokenKind::Join, "agent").encode(), later).unwrap_err().to_string();
    assert!(error.contains("2027-01-15T08:15:00Z"), "{error}");
    assert!(error.contains("`isthmusctl cluster join-token us-east`"), "{error}");
    let error = Token::parse_at(&token(TokenKind::Local, "workload/shop/cart").encode(), later).unwrap_err();
    assert!(error.to_string().contains("isthmus-agent token workload shop/cart"), "{error}");
}

#[test]
fn a_token_of_the_wrong_kind_is_named() {
    let error = token(TokenKind::Join, "agent").require(TokenKind::Local).unwrap_err();
    assert_eq!(error, TokenError::WrongKind { found: TokenKind::Join, wanted: TokenKind::Local });
    assert!(error.to_string().starts_with("this is a join token, a local token is needed here"), "{error}");
}

#[test]
fn damaged_fields_are_named() {
    let good = token(TokenKind::Join, "agent");
    let field = |token: &Token| match Token::parse_at(&token.encode(), NOW) {
        Err(TokenError::Field { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    for address in ["", "host", ":1", "host:0", "host:x"] {
        assert_eq!(field(&Token { address: address.into(), ..good.clone() }), "address");
    }
    for subject in ["", "root", "gateway/", "workload/a", "agent/x"] {
        assert_eq!(field(&Token { subject: subject.into(), ..good.clone() }), "subject");
    }
    assert_eq!(field(&Token { secret: String::new(), ..good.clone() }), "secret");
}

proptest! {
    #[test]
    fn parsing_never_panics(text in any::<String>(), body in "[A-Za-z0-9_-]{0,200}", ms in any::<u64>()) {
        drop(Token::parse_at(&text, NOW));
        drop(Token::parse_at(&format!("isthmus-join.{body}"), NOW));
        let odd = Token { expires_at: Timestamp(ms), ..token(TokenKind::Join, "agent") };
        drop(Token::parse_at(&odd.encode(), NOW));
    }

    #[test]
    fn damage_never_panics(at in 0usize..500, byte in any::<u8>()) {
        let mut bytes = token(TokenKind::Local, "dns/a").encode().into_bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        drop(Token::parse_at(&String::from_utf8_lossy(&bytes), NOW));
    }
}
