//! PEM text in and out (RFC 7468), for certificates. Keys go through rcgen.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};

/// Encodes certificates in the order given.
pub(crate) fn encode_certificates(chain: &[CertificateDer<'_>]) -> String {
    let mut text = String::new();
    for certificate in chain {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let mut line = 0;
        for character in STANDARD.encode(certificate).chars() {
            text.push(character);
            line += 1;
            if line == 64 {
                text.push('\n');
                line = 0;
            }
        }
        if line != 0 {
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

/// All certificates in `text`, in order; `None` if one is damaged.
pub(crate) fn decode_certificates(text: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>().ok()
}
